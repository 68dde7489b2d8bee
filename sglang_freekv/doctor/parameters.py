"""How many parameters a decoder has, from the fields of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Kinds (`model_type`) whose layers `count_parameters` knows: attention, a gated MLP or experts, two norms.
KNOWN_KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_EIGHT_BITS = "fp8"
_GROUP_BITS = 16 + 4  # scale and zero point of a group of weights that are quantized together


@dataclass(frozen=True)
class Parameters:
    """Counts of a whole model."""

    layers: int  # in all layers
    input_embedding: int
    output_embedding: int  # 0 where the input's is used
    final_norm: int

    @property
    def total(self) -> int:
        return self.layers + self.input_embedding + self.output_embedding + self.final_norm


def count_parameters(config: Mapping[str, Any]) -> Parameters:
    """Count what a Hugging Face configuration describes.

    Raises
    ------
    ValueError
        If a field is missing; names it.
    """
    if missing := [key for key in _NEEDED if config.get(key) is None]:
        raise ValueError(f"no {', '.join(missing)} in the configuration; give a model's config.json")
    layers, hidden, _, q_heads, vocab = (config[key] for key in _NEEDED)
    kv_heads = config.get("num_key_value_heads") or q_heads
    head_dim = config.get("head_dim") or hidden // q_heads
    kind = config.get("model_type", "")
    attention = 2 * hidden * (q_heads + kv_heads) * head_dim
    attention += (q_heads + 2 * kv_heads) * head_dim if kind == "qwen2" else 0  # biases
    attention += 2 * head_dim if kind.startswith("qwen3") else 0  # norms of queries and keys
    is_tied = bool(config.get("tie_word_embeddings"))
    return Parameters(
        layers=layers * (attention + _count_mlp(config, hidden) + 2 * hidden),
        input_embedding=vocab * hidden,
        output_embedding=0 if is_tied else vocab * hidden,
        final_norm=hidden,
    )


def _count_mlp(config: Mapping[str, Any], hidden: int) -> int:
    """Of one layer: a gated MLP, or experts with their router."""
    if num_experts := config.get("num_experts"):
        return num_experts * (3 * hidden * config["moe_intermediate_size"] + hidden)
    return 3 * hidden * config["intermediate_size"]


def estimate_weights_bytes(config: Mapping[str, Any], itemsize: int, quantization: str | None) -> int | None:
    """Size of a model's weights in memory; None where the kind of model, or its quantization, is not known here.

    Parameters
    ----------
    config : Mapping
        Of the language model, as in its config.json; `quantization_config` tells the bits of its layers.
    itemsize : int
        Bytes of a parameter that is not quantized.
    quantization : str or None
        SGLang's name of the method.
    """
    if config.get("model_type") not in KNOWN_KINDS:
        return None
    counts = count_parameters(config)
    others = (counts.total - counts.layers) * itemsize
    if quantization is None:
        return counts.layers * itemsize + others
    bits = _bits_of(config.get("quantization_config") or {}, quantization)
    return None if bits is None else int(counts.layers * bits / 8) + others


def _bits_of(quantization_config: Mapping[str, Any], quantization: str) -> float | None:
    """Bits of a quantized parameter, its share of scales and zero points included."""
    if quantization == _EIGHT_BITS:
        return 8
    bits, group_size = quantization_config.get("bits"), quantization_config.get("group_size")
    if not isinstance(bits, int):
        return None
    return bits + (_GROUP_BITS / group_size if isinstance(group_size, int) and group_size > 0 else 0)
