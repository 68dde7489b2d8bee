"""What becomes of a trained model: sharpened, judged at full attention, written as a checkpoint with its record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

from benchmarks.needle import language as lang
from benchmarks.needle.samples import Label, draw_batch
from benchmarks.records import describe_commit, describe_environment
from sglang_freekv.testing.tiny_model import write_checkpoint, write_json

_SHARPER = (1.0, 1.2, 1.4, 1.7)
_JUDGED = {"ask": 3, "ask_several": 1, "scattered": 1}
_LABELS = (Label.KEY, Label.JUMP, Label.COPY, Label.NEXT)


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, context: int, samples: int, seed: str, bar: tqdm) -> dict[str, float]:
    """Share of right next tokens by label, given the right ones before; full attention, float32.

    Parameters
    ----------
    context : int
        Tokens of a sample; the last eighth are questions and answers.
    samples : int
    seed : str
        Not of the training: those generators are seeded with numbers.
    """
    tail = context // 8
    right: dict[Label, list[torch.Tensor]] = {label: [] for label in _LABELS}
    for i in range(samples):
        batch = draw_batch(Random(f"{seed}-{context}-{i}"), _JUDGED, 1, context - tail, tail, max_position=0)
        logits = model(input_ids=batch.tokens, logits_to_keep=tail + 1, use_cache=False).logits[:, :-1]
        hit = logits.argmax(-1) == batch.tokens[:, -tail:]
        for label in _LABELS:
            right[label].append(hit[batch.labels[:, -tail:] == label])
        bar.update()
    shares = {label.name.lower(): torch.cat(hits).float() for label, hits in right.items()}
    return {label: share.mean().item() for label, share in shares.items() if len(share)}


def sharpen(model: Qwen3ForCausalLM, contexts: Sequence[int] = (16384, 32768), samples: int = 1) -> dict[str, float]:
    """Scale the queries behind the first layer so that attention stays sharp at lengths beyond the training's.

    Softmax spreads as the context grows. The best of a few factors is kept, as a part of the norms' weights.

    Returns
    -------
    Factor, as text -> share of right tokens, the mean over labels and contexts; "chosen" -> the factor.
    """
    norms = [layer.self_attn.q_norm for layer in model.model.layers[1:]]
    trained = [norm.weight.detach().clone() for norm in norms]

    def scale(factor: float) -> None:
        for norm, weight in zip(norms, trained, strict=True):
            norm.weight.data = weight * factor

    right = {}
    with tqdm(total=len(_SHARPER) * len(contexts) * samples, desc="sharpen") as bar:
        for factor in _SHARPER:
            scale(factor)
            by_context = (accuracy(model, context, samples, "sharpen", bar) for context in contexts)
            right[factor] = statistics.mean(share for shares in by_context for share in shares.values())
    chosen = max(right, key=right.get)
    scale(chosen)
    return {**{str(factor): value for factor, value in right.items()}, "chosen": chosen}


def write(model: Qwen3ForCausalLM, out: Path, max_context: int, record: dict) -> None:
    """Write the checkpoint in bfloat16, judge what was written, and put training.json beside it.

    Parameters
    ----------
    out : Path
        Folder: config.json, model.safetensors, tokenizer files, generation_config.json (answers end at ";").
    record : dict
        What is known of the training; accuracy by context, commit and environment are added.
    """
    config = {**model.config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    config |= {"torch_dtype": "bfloat16", "rope_theta": config["rope_parameters"]["rope_theta"]}
    generation_config = {"eos_token_id": lang.END, "temperature": 0.0}
    model.to(torch.bfloat16)
    write_checkpoint(out, model.state_dict(), config, lang.build_tokenizer(max_context), generation_config)
    model.to(torch.float32)
    samples = {4096: 8, 8192: 6, 16384: 4, 32768: 2}
    with tqdm(total=sum(samples.values()), desc="judge") as bar:
        judged = {context: accuracy(model, context, n, "judge", bar) for context, n in samples.items()}
    record |= {"accuracy": judged, "commit": describe_commit(), "environment": describe_environment()}
    write_json(out / "training.json", record)


def draw_curves(curve: Path, out: Path, points: int = 200) -> None:
    """Thin out a training's curve to `points` means, as JSON lines and as a picture of loss and accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [json.loads(line) for line in curve.read_text().splitlines()]
    width = -(-len(steps) // points)
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    names = ["loss", *(label.name.lower() for label in Label if label is not Label.NONE)]
    thin = []
    for group in groups:
        means = {n: statistics.mean(s[n] for s in group if n in s) for n in names if any(n in s for s in group)}
        thin.append({"step": group[-1]["step"], "stage": group[-1]["stage"], "seconds": group[-1]["seconds"], **means})
    (out / "training.jsonl").write_text("".join(json.dumps(point) + "\n" for point in thin))
    figure, axes = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    for name in names:
        known = [p for p in thin if name in p]
        axes[int(name != "loss")].plot([p["seconds"] / 60 for p in known], [p[name] for p in known], label=name)
    for group in groups[1:]:
        if group[0]["stage"] != steps[group[0]["step"] - 2]["stage"]:
            for axis in axes:
                axis.axvline(group[0]["seconds"] / 60, color="0.8", linewidth=0.8, zorder=0)
            axes[0].text(group[0]["seconds"] / 60, axes[0].get_ylim()[1], group[0]["stage"], fontsize=8, color="0.4")
    axes[0].set_ylabel("loss")
    axes[1].set(ylabel="share of right tokens", xlabel="minutes", ylim=(0, 1.02))
    axes[1].legend(ncols=6, fontsize=8, frameon=False)
    figure.savefig(out / "training.png", dpi=110)
