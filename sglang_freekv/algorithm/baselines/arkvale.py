"""ArkVale: pages are summarised by a bounding volume of their keys, and recalled when a query wants them again.

Source: "ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction" (NeurIPS 2024). A page's keys
lie in a ball, and its score is the largest logit that a key of the ball can have. (In a box instead of a ball, that is
the bound of minimum and maximum: the selector min-max.) InfLLM (arXiv 2402.04617) differs in that its summaries are
tokens which represent their page.

Here the ball is around the mean of the keys, and each step selects again, as the paper's does; nothing is speculated
with `--freekv-tau 2`.
"""

from __future__ import annotations

import torch

from freekv_kernels import Batch, FlagList, Half
from sglang_freekv.algorithm.selector import Scores, Selector
from sglang_freekv.memory.layers import Layer


class ArkValeSelector(Selector):
    """By the largest logit in the ball around a page's keys: q . centre + radius * |q|, see `BallsIndex`."""

    baseline = "ArkVale (NeurIPS 2024)"
    runs_on_gpu = False

    def score(self, layer: Layer, batch: Batch, half: Half, scale: float, flags: FlagList | None = None) -> Scores:
        index = self.memory.index
        centres, radii = (x[index.places[layer.number], batch.page_table].float() for x in (index.centres, index.radii))
        q = layer.last_q[batch.rows].float()
        scores = torch.einsum("bhgd,bphd->bhgp", q, centres)
        scores += q.norm(dim=-1)[..., None] * radii.transpose(1, 2)[:, :, None]
        return Scores(scores.flatten(0, 1))
