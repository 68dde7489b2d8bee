"""StreamingLLM: sink and recent tokens only.

Source: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453): the first tokens take attention
that no other token wants, so keeping them beside the latest tokens keeps a model stable without any selection.

Here the unit is a page, so the sink is `--freekv-sink` tokens (the paper: 4 tokens), and positions stay those of the
text, where the paper counts them within the window. What is left of a request's budget goes to the latest pages.
"""

from __future__ import annotations

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.algorithm.selector import Scores, Selector
from sglang_freekv.memory.layers import Layer


class StreamingLLMSelector(Selector):
    """The latest pages, at any budget: a page's score is its position."""

    baseline = "StreamingLLM (arXiv 2309.17453)"

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        g, max_pages = self.memory.geometry, batch.page_table.shape[1]
        num_rows = len(batch.rows) * g.num_kv_heads
        scores = self.memory.tables.scores(half, num_rows)
        if scores is None:
            scores = torch.empty((num_rows, g.group_size, max_pages), device=batch.rows.device)
        return Scores(scores.copy_(torch.arange(scores.shape[-1], device=scores.device)))
