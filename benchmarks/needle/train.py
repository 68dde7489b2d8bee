"""Training of the needle model: stages of growing length, which go on where they were interrupted."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.needle import language as lang
from benchmarks.needle.samples import Label, draw_batch

SEED = 7
MAX_CONTEXT = 65_536  # tokens
_MUON_LR, _ADAMW_LR = 0.02, 3e-3
_WARMUP_STEPS = 50
_SAVE_SECONDS = 60
_LABEL_WEIGHTS = {Label.INVENT: 0.1}  # of the loss; 1 where not named
_MIXED = {"ask": 5, "ask_several": 2, "scattered": 1, "invent": 0.5, "common": 0.5}
_LATE = {**_MIXED, "pasted": 2}


@dataclass(frozen=True)
class Stage:
    """Some steps at one length."""

    name: str
    steps: int
    batch: int
    document: int  # tokens
    tail: int  # tokens
    families: dict[str, float]
    rate: tuple[float, float] = (1.0, 1.0)  # of the learning rates, at its first and its last step


STAGES = (
    Stage("repeat", 160, 32, 128, 128, {"repeat": 1}),
    Stage("256", 140, 32, 160, 96, {**_MIXED, "repeat": 1}),
    Stage("512", 220, 16, 352, 160, _MIXED),
    Stage("1024", 180, 8, 736, 288, _MIXED, rate=(1.0, 0.7)),
    Stage("2048", 240, 4, 1504, 544, _LATE, rate=(0.7, 0.4)),
    Stage("4096", 200, 2, 3072, 1024, _LATE, rate=(0.4, 0.2)),
    Stage("8192", 110, 1, 6144, 2048, _LATE, rate=(0.2, 0.05)),
)


def model_config() -> Qwen3Config:
    """The architecture: 4 query heads per KV head, 1.8 million parameters."""
    config = Qwen3Config(
        vocab_size=lang.VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rope_theta=1e7,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=lang.END,
    )
    config._attn_implementation = "sdpa"
    return config


@torch.no_grad()
def look_back(model: Qwen3ForCausalLM) -> None:
    """Let the first KV head of layer 0 attend to the previous tokens: its query heads to the one 1, 2, 3, 4 back.

    Induction starts with such heads; a model that has to find them by itself spends many minutes on it. One channel
    of the embedding is made constant; queries and keys read from it a vector whose fast pairs RoPE turns, the
    queries' turned by the offset, so that their product is largest there.
    """
    config, layer = model.config, model.model.layers[0].self_attn
    half = config.head_dim // 2
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 4 * embedding.std()
    speed = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    vector = torch.zeros(half).masked_fill(speed > 0.03, 1.0)
    layer.k_proj.weight[:half, 0] = vector
    layer.k_proj.weight[half : config.head_dim, 0] = 0
    for head in range(config.num_attention_heads // config.num_key_value_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        turn = -speed * (head + 1)
        layer.q_proj.weight[rows, 0] = torch.cat((vector * turn.cos(), vector * turn.sin()))


class Trainer:
    """Model, optimizers and the number of steps done; saved to and restored from a folder."""

    def __init__(self, state: Path) -> None:
        torch.manual_seed(SEED)
        self.model = Qwen3ForCausalLM(model_config())
        look_back(self.model)
        body = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "layers" in name]
        rest = [p for name, p in self.model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
        self.optimizers = {
            "muon": torch.optim.Muon(body, lr=_MUON_LR, weight_decay=0.0),
            "adamw": torch.optim.AdamW(rest, lr=_ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
        }
        self.step = 0
        self.seconds = 0.0
        self._file = state / "state.pt"
        self._curve = state / "curve.jsonl"
        self._saved = time.monotonic()
        state.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self._file)
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        lines = self._curve.read_text().splitlines()[: self.step]
        self._curve.write_text("".join(f"{line}\n" for line in lines))

    def save(self) -> None:
        """Write everything that is needed to go on; an interruption never leaves half a file."""
        state = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= {"model": self.model.state_dict(), "step": self.step, "seconds": self.seconds}
        torch.save(state, self._file.with_suffix(".new"))
        self._file.with_suffix(".new").rename(self._file)
        self._saved = time.monotonic()

    def run(self, until: str) -> None:
        """Train through the stages that are left, to the end of the one named."""
        first = 0
        for stage in STAGES:
            done = min(max(self.step - first, 0), stage.steps)
            with tqdm(range(done, stage.steps), desc=f"stage {stage.name}", initial=done, total=stage.steps) as bar:
                for i in bar:
                    bar.set_postfix(self._train_step(stage, i))
                    if time.monotonic() - self._saved > _SAVE_SECONDS:
                        self.save()
            first += stage.steps
            self.save()
            if stage.name == until:
                return

    def _train_step(self, stage: Stage, i: int) -> dict[str, float]:
        start = time.monotonic()
        batch = draw_batch(Random(f"{SEED}-{self.step}"), stage.families, stage.batch, stage.document, stage.tail)
        logits = self.model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            # With a mask of its own, transformers takes jumps in the positions for jumps, not for packed samples.
            attention_mask=torch.ones_like(batch.tokens),
            logits_to_keep=stage.tail + 1,
            use_cache=False,
        ).logits[:, :-1]
        labels, targets = batch.labels[:, -stage.tail :], batch.tokens[:, -stage.tail :]
        weights = torch.tensor([0.0 if label is Label.NONE else _LABEL_WEIGHTS.get(label, 1.0) for label in Label])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weight = weights[labels.flatten()]
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * i / stage.steps
        rate *= min(1.0, (self.step + 1) / _WARMUP_STEPS)
        for optimizer, base in zip(self.optimizers.values(), (_MUON_LR, _ADAMW_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        right = logits.argmax(-1) == targets
        accuracy = {
            label.name.lower(): right[labels == label].float().mean().item()
            for label in Label
            if label is not Label.NONE and (labels == label).any()
        }
        self.step += 1
        self.seconds += time.monotonic() - start
        point = {"step": self.step, "stage": stage.name, "loss": loss.item(), "seconds": self.seconds, **accuracy}
        with self._curve.open("a") as file:
            file.write(json.dumps(point) + "\n")
        return {"loss": f"{loss.item():.3f}", **{name: f"{value:.2f}" for name, value in accuracy.items()}}
