"""One-time selection: the pages of a prompt are chosen when it ends, by its last queries, and never again.

Sources: SnapKV (arXiv 2404.14469) keeps what the last queries of the prompt, the observation window, attend to most;
SAGE-KV (arXiv 2503.08879) does so once, with the last token's query, and goes on with sink, chosen and recent tokens.

Here pages are chosen instead of tokens: by the attention, exact and averaged over the observation window and the query
group, that all their tokens receive together, which takes the place of SnapKV's pooling over neighbours. What the
prompt's last chunk does not hold of the observation window is left out. Pages that leave `recent` later are forgotten;
while a budget has room for more than the prompt, the latest of them fill it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.algorithm.baselines.page_attention import page_shares
from sglang_freekv.algorithm.selector import Scores, Selector
from sglang_freekv.memory.layers import Layer

if TYPE_CHECKING:
    from sglang_freekv.memory.kv_memory import KVMemory


class OneTimeSelector(Selector):
    """By ranks that are given when the prompt ends.

    Attributes
    ----------
    ranks : float32, ``[num_layers, max_requests + 1, num_kv_heads, max_pages]``
        Of a request's pages; later pages are below those of the prompt, and better the later they are.
    """

    baseline = "one-time selection after the prompt: SnapKV (arXiv 2404.14469), SAGE-KV (arXiv 2503.08879)"
    runs_on_gpu = False
    num_observed = 32

    def __init__(self, memory: KVMemory) -> None:
        super().__init__(memory)
        g = memory.geometry
        self.ranks = torch.zeros(g.num_layers, memory.max_requests + 1, g.num_kv_heads, memory.max_pages)

    def start(self, layer: Layer, batch: Batch, queries: torch.Tensor, num_known: torch.Tensor, scale: float) -> None:
        ranks = self.ranks[layer.number]
        page = torch.arange(batch.page_table.shape[1])
        for i, row in enumerate(batch.rows.tolist()):  # one after the other, to bound the memory
            one = batch.one(i)
            known = queries[i : i + 1, : int(num_known[i])]
            shares = page_shares(layer, one, page.expand(1, ranks.shape[1], -1), known, scale)
            is_prompt = page < one.num_pages_next - self.memory.sizes.recent
            scores = torch.full(ranks.shape[1:], float("-inf"))
            scores[:, : len(page)] = shares[0].flatten(1, 2).logsumexp(1).masked_fill_(~is_prompt, float("-inf"))
            ranks[row] = scores.argsort(stable=True).argsort().float()

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        ranks = self.ranks[layer.number, batch.rows, :, : batch.page_table.shape[1]]
        return Scores(ranks.flatten(0, 1)[:, None].expand(-1, self.memory.geometry.group_size, -1))
