"""Write a small Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE checkpoint with seeded random weights: no download.

    python -m sglang_freekv.testing.tiny_model --arch llama --out models/tiny

Plain random weights make a poor test model: attention is nearly uniform, the next token depends on the last
one only, consecutive queries have nothing in common. Here the scales are chosen, and one channel is reserved:

- channel 0 of the residual stream holds a large constant (trained models have such massive activations). Only
  query projections read it, so the queries of consecutive steps are alike, as in trained models: much in the
  first KV head's group, little in the last one's, so that a correction threshold divides them;
- scores are so wide that a few dozen keys, anywhere in the context, carry most of the attention;
- attention weighs about as much as the token itself in the last hidden state; the next token needs both;
- only printable ASCII is generated: output is text, and ends at the requested length.

To compare the greedy tokens of two implementations, serve it with `--dtype float32`: in bfloat16, rounding
alone flips a few tokens in a hundred, as in any model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_CONSTANT_SHARE = 0.8  # of the squared norm of what a projection reads
_CONSTANT_VARIANCE = _CONSTANT_SHARE / (1 - _CONSTANT_SHARE)  # of the constant, relative to the embedding
_STEADY, _QUICK = 0.95, 0.1  # cosine of the queries of two steps before RoPE: first KV head, last KV head
_SCORE_STD = 2.75  # of q.k / sqrt(head_dim) over the keys; 0 is uniform attention, above 4 is one-hot
_ATTENTION_GAIN = 3.0  # a head averages about ten values, which takes this factor off them
_MLP_GAIN = 1.0
_LAYER_VARIANCE = 1.0  # that a layer adds to the residual stream, whose embedding has variance 1
_LOGIT_STD = 4.0
_NEVER_LOGIT = -50.0  # of tokens that are not generated, from the constant channel
_REPEAT_AVERSION = 0.4  # share of its own embedding that a token's logit subtracts: no runs of one token
_BIAS_STD = 0.3  # of Qwen2's queries, keys and values
_EXPERTS, _EXPERTS_PER_TOKEN = 4, 2
_ROUTER_STD = 2.0  # of an expert's logit
_ROPE_THETA = 1e7
_NORM_EPS = 1e-6

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """Everything that determines a checkpoint; equal values give equal bytes."""

    arch: Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"] = "llama"
    layers: int = 4
    hidden: int = 256
    heads: int = 8  # query heads
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 512  # 256 bytes, the special tokens, and padding
    max_position: int = 131072  # tokens
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in _ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(_ARCHITECTURES)}, got {self.arch!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.hidden % self.heads:  # transformers refuses such a configuration, even where head_dim says otherwise
            raise ValueError(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.vocab < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab must be at least {MIN_VOCAB_SIZE} (bytes, specials), got {self.vocab}")

    def write(self, out: Path) -> None:
        """Write config.json, model.safetensors and the tokenizer files into the folder `out`."""
        generation_config = {"eos_token_id": special_id("<|end|>")}
        tokenizer = build_tokenizer(self.vocab, self.max_position)
        write_checkpoint(out, self.weights(), self.hf_config(), tokenizer, generation_config)

    def hf_config(self) -> dict:
        """The model's config.json."""
        experts = {
            "num_experts": _EXPERTS,
            "num_experts_per_tok": _EXPERTS_PER_TOKEN,
            "moe_intermediate_size": 2 * self.hidden,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        return {
            **sizes_in_config(self, _ARCHITECTURES[self.arch]),
            "rope_theta": _ROPE_THETA,
            "rms_norm_eps": _NORM_EPS,
            "hidden_act": "silu",
            "attention_bias": False,  # Qwen2 has biases without asking
            "sliding_window": None,  # Mistral has one without asking
            "tie_word_embeddings": False,
            "pad_token_id": special_id("<|pad|>"),
            "bos_token_id": None,
            "eos_token_id": special_id("<|end|>"),
            "torch_dtype": self.dtype,
            **(experts if self.arch == "qwen3_moe" else {}),
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters under their Hugging Face names, in `dtype`, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = {
            "model.embed_tokens.weight": torch.randn(self.vocab, self.hidden, generator=generator),
            "lm_head.weight": _reads(self.vocab, self.hidden, generator, std=_LOGIT_STD),
            "model.norm.weight": self._norm_weight(self.layers),
        }
        weights["model.embed_tokens.weight"][:, 0] = math.sqrt(self.hidden * _CONSTANT_VARIANCE)
        aversion = _REPEAT_AVERSION * _LOGIT_STD / math.sqrt(self.hidden * (1 - _CONSTANT_SHARE))
        weights["lm_head.weight"][:, 1:] -= aversion * weights["model.embed_tokens.weight"][:, 1:]
        never = ~_is_generated(self.vocab)
        weights["lm_head.weight"][never] = 0
        weights["lm_head.weight"][never, 0] = _NEVER_LOGIT / math.sqrt(_CONSTANT_SHARE * self.hidden)
        for i in range(self.layers):
            for name, weight in self._layer_weights(generator).items():
                weights[f"model.layers.{i}.{name}"] = weight
            weights[f"model.layers.{i}.input_layernorm.weight"] = self._norm_weight(i)
            weights[f"model.layers.{i}.post_attention_layernorm.weight"] = self._norm_weight(i)
        return {name: weight.to(getattr(torch, self.dtype)) for name, weight in weights.items()}

    def _layer_weights(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        q_rows, kv_rows, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, 2 * self.hidden
        qk_std = math.sqrt(_SCORE_STD)
        cosine = torch.linspace(_STEADY, _QUICK, self.kv_heads).repeat_interleave(q_rows // self.kv_heads)
        weights = {
            "self_attn.q_proj.weight": _reads(q_rows, self.hidden, generator, std=qk_std, cosine=cosine),
            "self_attn.k_proj.weight": _reads(kv_rows, self.hidden, generator, std=qk_std),
            "self_attn.v_proj.weight": _reads(kv_rows, self.hidden, generator),
            "self_attn.o_proj.weight": _writes(self.hidden, q_rows, generator, gain=_ATTENTION_GAIN),
        }
        if self.arch == "qwen2":
            for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                weights[f"self_attn.{name}.bias"] = torch.randn(rows, generator=generator) * _BIAS_STD
        if self.arch in ("qwen3", "qwen3_moe"):
            weights["self_attn.q_norm.weight"] = torch.full((self.head_dim,), qk_std)
            weights["self_attn.k_norm.weight"] = torch.full((self.head_dim,), qk_std)
        experts = [f".experts.{i}" for i in range(_EXPERTS)] if self.arch == "qwen3_moe" else [""]
        if self.arch == "qwen3_moe":
            weights["mlp.gate.weight"] = _reads(_EXPERTS, self.hidden, generator, std=_ROUTER_STD)
        for expert in experts:
            weights[f"mlp{expert}.gate_proj.weight"] = _reads(inner, self.hidden, generator)
            weights[f"mlp{expert}.up_proj.weight"] = _reads(inner, self.hidden, generator)
            weights[f"mlp{expert}.down_proj.weight"] = _writes(self.hidden, inner, generator, gain=_MLP_GAIN)
        return weights

    def _norm_weight(self, num_layers_before: int) -> torch.Tensor:
        """Undo the growth of the residual stream: every layer reads the constant with the same share."""
        variance = 1 + _LAYER_VARIANCE * num_layers_before
        rms = math.sqrt(_CONSTANT_VARIANCE + variance)
        weight = torch.full((self.hidden,), math.sqrt((1 - _CONSTANT_SHARE) / variance) * rms)
        weight[0] = math.sqrt(_CONSTANT_SHARE / _CONSTANT_VARIANCE) * rms
        return weight


def _reads(
    rows: int,
    hidden: int,
    generator: torch.Generator,
    *,
    std: float = 1.0,
    cosine: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Draw a projection to outputs of deviation `std`, with the share `cosine` from the constant channel."""
    cosine = torch.as_tensor(cosine).expand(rows)
    weight = torch.randn(rows, hidden, generator=generator) * std / math.sqrt(hidden)
    weight[:, 0] *= (cosine / _CONSTANT_SHARE).sqrt()
    weight[:, 1:] *= ((1 - cosine) / (1 - _CONSTANT_SHARE)).sqrt()[:, None]
    return weight


def _writes(hidden: int, columns: int, generator: torch.Generator, *, gain: float) -> torch.Tensor:
    """Draw a projection back into the residual stream that leaves the constant channel alone."""
    weight = torch.randn(hidden, columns, generator=generator) * gain / math.sqrt(columns)
    weight[0] = 0
    return weight


def build_tokenizer(vocab_size: int, max_position: int) -> tuple[Tokenizer, dict]:
    """Build a byte-level tokenizer: one token per byte, any text survives the round trip.

    Returns
    -------
    The tokenizer and the content of its tokenizer_config.json.
    """
    tokens = [*_byte_tokens(), *(f"<|reserved_{i}|>" for i in range(vocab_size - MIN_VOCAB_SIZE))]
    ids = {token: i for i, token in enumerate(tokens[:256])}
    ids |= {token: i + MIN_VOCAB_SIZE for i, token in enumerate(tokens[256:])}
    ids |= {token: special_id(token) for token in SPECIAL_TOKENS}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(specials)
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "unk_token": None,  # the class for Qwen2 would add its own
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
        "chat_template": _CHAT_TEMPLATE,
    }


def _byte_tokens() -> list[str]:
    """The 256 characters of the byte-level alphabet; a token's id is the byte's rank in it."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def sizes_in_config(model: Any, architecture: str) -> dict[str, Any]:
    """What every config.json says: the class, and the sizes that a tiny model has as fields of these names."""
    return {
        "architectures": [architecture],
        "model_type": model.arch,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": 2 * model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.max_position,
    }


def special_id(token: str) -> int:
    return 256 + SPECIAL_TOKENS.index(token)


def _is_generated(vocab_size: int) -> torch.Tensor:
    """bool, ``[vocab_size]``: printable ASCII, which stands for itself in the alphabet (Ġ for the blank)."""
    printable = [token == "Ġ" or (token.isascii() and token.isprintable()) for token in _byte_tokens()]
    return torch.tensor(printable + [False] * (vocab_size - 256))


def write_checkpoint(
    out: Path,
    weights: dict[str, torch.Tensor],
    config: dict,
    tokenizer: tuple[Tokenizer, dict],
    generation_config: dict,
) -> None:
    """Write the files of a checkpoint into the folder `out`, made if missing; the tokenizer comes with its config."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer[0].save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer[1])
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation_config)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, made if missing")
    for field in dataclasses.fields(TinyModel):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        parser.add_argument(flag, type=type(default), default=default, help=f"default {default}")
    values = vars(parser.parse_args())
    out = values.pop("out")
    TinyModel(**values).write(out)
    size_mb = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"wrote {out} ({size_mb:.1f} MB)")


if __name__ == "__main__":
    main()
