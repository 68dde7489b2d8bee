"""What a decode step does inside the engine, layer by layer, beside what full attention would have looked at."""

from __future__ import annotations

from typing import NamedTuple

import torch

from freekv_kernels import Batch, compare_queries
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.layers import Layer


class LayerStep(NamedTuple):
    """One layer in one step. `num_texts` requests over their budget."""

    similarity: torch.Tensor  # float32 [num_texts], of queries with the step before, mean over heads
    flagged: torch.Tensor  # float32 [num_texts], share of the KV heads that were corrected
    turnover: torch.Tensor  # float32 [num_texts], share of the selected pages that the step before did not have
    exposed: int  # recalls that attention waited for
    hidden: int  # recalls for the next step
    kept: torch.Tensor | None  # float32 [num_texts], attention mass of the window, mean over heads; None: not looked at
    best: torch.Tensor | None  # the same of the best window with as many pages, sink and recent included


class Probe:
    """Stands between SGLang and the engine's `Decode.run`, and notes each layer of each step.

    Parameters
    ----------
    decode : Decode
    every : int
        Steps of which one computes exact attention over the whole context, which is slow.
    """

    def __init__(self, decode: Decode, every: int) -> None:
        self._decode, self._run, self._every = decode, decode.run, every
        self.steps: list[list[LayerStep]] = []
        self._windows: dict[int, torch.Tensor] = {}  # layer -> the step before's
        decode.run = self.run

    def run(
        self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: None = None
    ) -> torch.Tensor:
        """As `Decode.run`, of a model without sinks whose layers all see everything."""
        memory, batch = self._decode.memory, self._decode.last_plan.batch
        g, layer = memory.geometry, memory.layers[number]
        if number == 0:
            self.steps.append([])
        heads = q.view(-1, g.num_kv_heads, g.group_size, g.head_dim)
        similarity = compare_queries(heads, layer.last_q[batch.rows]).mean(-1)
        out = self._run(number, q, k, v, scale)
        window = layer.windows[int(batch.step) % 2][batch.rows]
        kept = best = None
        if len(self.steps) % self._every == 0:
            kept, best = _kept_mass(memory, layer, batch, heads, window, scale)
        before = self._windows.get(number, window)
        self._windows[number] = window.clone()
        flags = self._decode.last_plan.flags[number]
        self.steps[-1].append(
            LayerStep(
                similarity=similarity,
                flagged=flags.is_flagged.view(len(window), -1).float().mean(-1),
                turnover=turnover(window, before, memory.sizes.sink, memory.sizes.recent),
                exposed=int(layer.front.count),
                hidden=int(layer.back.count),
                kept=kept,
                best=best,
            )
        )
        return out


def turnover(window: torch.Tensor, before: torch.Tensor, sink: int, recent: int) -> torch.Tensor:
    """Share of the selected pages that are new, per text; 0 where nothing is selected.

    Parameters
    ----------
    window, before : int32, ``[num_texts, num_kv_heads, width]``, ascending, -1 padded
    sink, recent : int, pages that are not selected
    """
    position, num_pages = torch.arange(window.shape[-1]), (window >= 0).sum(-1, keepdim=True)
    is_selected = (position >= sink) & (position < num_pages - recent)
    is_new = is_selected & ~(window[..., None] == before[..., None, :]).any(-1)
    return is_new.sum((1, 2)) / is_selected.sum((1, 2)).clamp_min(1)


def _kept_mass(
    memory: KVMemory, layer: Layer, batch: Batch, q: torch.Tensor, window: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass of windows, and of the best ones of the same size, per text."""
    sizes = memory.sizes
    kept, best = [], []
    for text, pages in enumerate(window):
        num_pages, num_tokens = int(batch.num_pages[text]), _num_tokens(memory, batch, text)
        keys = layer.store.codec.decode_keys(layer.store.host_kv, batch.page_table[text, :num_pages], q.dtype)
        mass = page_mass(q[text], keys, num_tokens, scale)
        is_in = torch.zeros_like(mass, dtype=torch.bool)
        rows = [own[own >= 0].long() for own in pages]
        for head, own in enumerate(rows):
            is_in[head, own] = True
        kept.append(mass[is_in].sum() / len(mass))
        fixed = torch.zeros_like(is_in)
        fixed[:, : sizes.sink] = fixed[:, -sizes.recent :] = True
        best.append(_best_mass(mass, fixed, [len(own) for own in rows]))
    return torch.stack(kept), torch.stack(best)


def _num_tokens(memory: KVMemory, batch: Batch, text: int) -> int:
    """Tokens of a request in the step: its full pages, and what its last page holds."""
    num_pages, page_size = int(batch.num_pages[text]), memory.geometry.page_size
    last = batch.page_table[text, num_pages - 1]
    return (num_pages - 1) * page_size + int(memory.host.filled[last])


def page_mass(q: torch.Tensor, keys: torch.Tensor, num_tokens: int, scale: float) -> torch.Tensor:
    """Share of attention that each page gets, mean over the query heads of a group.

    Parameters
    ----------
    q : ``[num_kv_heads, group_size, head_dim]``
    keys : ``[num_pages, num_kv_heads, page_size, head_dim]``
    num_tokens : int
        Those after it are not the request's.

    Returns
    -------
    float32, ``[num_kv_heads, num_pages]``
    """
    num_pages, num_kv_heads, page_size, _ = keys.shape
    flat = keys.transpose(0, 1).flatten(1, 2)[:, :num_tokens].float()
    shares = (q.float() @ flat.transpose(1, 2) * scale).softmax(-1).mean(1)
    padded = torch.nn.functional.pad(shares, (0, num_pages * page_size - num_tokens))
    return padded.view(num_kv_heads, num_pages, page_size).sum(-1)


def _best_mass(mass: torch.Tensor, is_fixed: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Mass of the fixed pages and the largest others, `widths` pages in all of each head; mean over heads."""
    ordered = mass.masked_fill(is_fixed, 2.0).argsort(-1, descending=True)
    kept = [mass[head, pages[:width]].sum() for head, (pages, width) in enumerate(zip(ordered, widths, strict=True))]
    return torch.stack(kept).mean()
