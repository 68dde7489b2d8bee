"""Queries, keys and values of a model's layers, while it reads a document and gives the right answers about it.

Feeding the right answers yields the queries of every decode step in one forward. The same forward takes any rule for
what a step may see, so the loss that a rule causes shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel, Qwen3ForCausalLM

KeysValues = tuple[torch.Tensor, torch.Tensor]  # float32, [num_kv_heads, tokens, head_dim] each, keys post-RoPE
# (layer, queries and keys as in `Layer`) -> bool [num_kv_heads, tail tokens, tokens]: what each token of the tail sees
Visible = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
_NAME = "capture"


class Layer(NamedTuple):
    """What attention of one layer works on."""

    q: torch.Tensor  # float32, [num_heads, tail tokens, head_dim], post-RoPE
    k: torch.Tensor  # float32, [num_kv_heads, tokens, head_dim], post-RoPE; of the document and the tail
    v: torch.Tensor  # as k


class Capture(NamedTuple):
    """A forward over the tail of a text."""

    layers: list[Layer]
    logits: torch.Tensor  # float32, [tail tokens, vocabulary]


def load_model(folder: Path) -> PreTrainedModel:
    """Load a Qwen3 checkpoint for capturing.

    Raises
    ------
    FileNotFoundError
        If the folder holds no checkpoint.
    """
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: expected config.json and weights; run make train-model")
    return prepare_model(Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32))


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Let `prefill` and `run_tail` see the attention of a transformers model; it runs nowhere else afterwards."""
    AttentionInterface.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)
    return model.eval()


def _attention(module, query, key, value, attention_mask, *, attend, **kwargs):
    """The interface of transformers: hand one sequence to `attend(layer, q, k, v)`."""
    return attend(module.layer_idx, query[0], key[0], value[0]).transpose(0, 1)[None], None


@torch.inference_mode()
def _forward(model: PreTrainedModel, tokens: Sequence[int], start: int, attend: Callable, logits_to_keep: int):
    """Logits of the last tokens (0: of all), the first token being at position `start`."""
    return model(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.arange(start, start + len(tokens))[None],
        attention_mask={"full_attention": None},  # ready as it is: `attend` masks
        use_cache=False,
        logits_to_keep=logits_to_keep,
        attend=attend,
    ).logits[0]


def prefill(model: PreTrainedModel, document: Sequence[int]) -> list[KeysValues]:
    """Keys and values of a document, per layer, with dense causal attention."""
    layers: list[KeysValues] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layers.append((k, v))
        # With a batch dimension and equal heads a CPU takes the kernel that never stores the weights.
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]

    _forward(model, document, 0, attend, logits_to_keep=1)
    return layers


def run_tail(
    model: PreTrainedModel, prefix: list[KeysValues], tail: Sequence[int], visible: Visible | None = None
) -> Capture:
    """Read `tail` after a document.

    Parameters
    ----------
    prefix
        Of `prefill`; not changed, so many tails can follow one document.
    visible
        Restricts attention, layer by layer: later layers see the effect, in queries and in keys of the tail.
        By default attention is dense. What is not causal must be False.
    """
    start = prefix[0][0].shape[1]
    layers: list[Layer] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (torch.cat(pair, 1) for pair in zip(prefix[layer], (k, v), strict=True))
        layers.append(Layer(q, k, v))
        mask = causal(start, len(tail))[None] if visible is None else visible(layer, q, k)
        group_size = len(q) // len(k)
        mask = mask.expand(len(k), -1, -1).repeat_interleave(group_size, 0)
        k, v = (x.repeat_interleave(group_size, 0) for x in (k, v))
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])[0]

    return Capture(layers, _forward(model, tail, start, attend, logits_to_keep=0))


def causal(start: int, count: int) -> torch.Tensor:
    """What `count` tokens from position `start` on see, bool ``[count, start + count]``."""
    return torch.ones(count, start + count, dtype=torch.bool).tril(start)
