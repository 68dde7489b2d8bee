"""A method beside full attention on the same texts: what each step predicted, and what the engine did for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.footprint import Footprint, footprint
from benchmarks.real_model.probe import LayerStep
from freekv_kernels import Count
from sglang_freekv.memory.kv_memory import KVMemory


class Prediction(NamedTuple):
    """One step of all texts, float32 ``[num_texts]`` each."""

    kl: torch.Tensor  # nats, KL(full || method) of the next token
    nll_full: torch.Tensor  # nats, of the text's next token
    nll: torch.Tensor
    agrees: torch.Tensor  # 1 where both have the same most probable token


def compare(full: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Prediction:
    """Compare next-token distributions.

    Parameters
    ----------
    full : float32, ``[num_texts, vocabulary]``
        Log-probabilities under full attention.
    logits : ``[num_texts, >= vocabulary]``
        Of the method.
    targets : int64, ``[num_texts]``
        The text's next tokens.
    """
    own = logits[:, : full.shape[1]].float().log_softmax(-1).cpu()
    targets = targets.cpu()[:, None]
    return Prediction(
        kl=(full.exp() * (full - own)).sum(-1).clamp_min(0),
        nll_full=-full.gather(1, targets)[:, 0],
        nll=-own.gather(1, targets)[:, 0],
        agrees=(full.argmax(-1) == own.argmax(-1)).float(),
    )


@dataclass(frozen=True)
class Comparison:
    """One method with one budget behind one context. Arrays are float32; layers are the last dimension."""

    method: str
    context: int  # tokens of the prompt
    budget: int  # tokens
    predictions: np.ndarray  # [steps, 4, num_texts], as in `Prediction`
    similarity: np.ndarray  # [steps, num_texts, layers]
    flagged: np.ndarray  # the same; nothing is flagged within the budget
    turnover: np.ndarray  # [steps - 1, num_texts, layers]
    kept: np.ndarray  # [steps looked at, num_texts, layers]
    best: np.ndarray
    exposed_bytes: float  # recalled per decoded token while attention waited
    hidden_bytes: float  # recalled per decoded token for the next step
    pages: float  # that a row over its budget read, mean; 0 where there was none
    scored: float  # share of those rows whose pages were scored in a step
    footprint: Footprint

    def of_texts(self, name: str) -> np.ndarray:
        """Means of a number over the steps, per text: ``[num_texts]``."""
        if name in Prediction._fields:
            return self.predictions[:, Prediction._fields.index(name)].mean(0)
        return getattr(self, name).mean((0, 2))

    @classmethod
    def of(
        cls,
        method: str,
        context: int,
        predictions: Sequence[Prediction],
        layers: Sequence[Sequence[LayerStep]],
        memory: KVMemory,
    ) -> Comparison:
        """Put the steps of a cell together.

        Parameters
        ----------
        layers : of each step and layer
        memory : KVMemory
            Whose counters were at zero before the steps.
        """
        g, num_texts = memory.geometry, len(predictions[0].kl)

        def stacked(name: str, steps: Sequence[Sequence[LayerStep]]) -> np.ndarray:
            return torch.stack([torch.stack([getattr(layer, name) for layer in step], -1) for step in steps]).numpy()

        looked_at = [step for step in layers if step[0].kept is not None]
        recalled = memory.counters[Count.RECALLS] * g.record_bytes / len(layers) / num_texts
        exposed, hidden = (sum(getattr(x, name) for step in layers for x in step) for name in ("exposed", "hidden"))
        return cls(
            method=method,
            context=context,
            budget=memory.sizes.budget * g.page_size,
            predictions=torch.stack([torch.stack(list(step)) for step in predictions]).numpy(),
            similarity=stacked("similarity", layers),
            flagged=stacked("flagged", layers),
            turnover=stacked("turnover", layers[1:]),
            kept=stacked("kept", looked_at),
            best=stacked("best", looked_at),
            exposed_bytes=recalled * exposed / max(1, exposed + hidden),
            hidden_bytes=recalled * hidden / max(1, exposed + hidden),
            pages=memory.counters[Count.PAGES_READ] / max(1, memory.counters[Count.ROWS]),
            scored=memory.counters[Count.SCORED_ROWS] / max(1, memory.counters[Count.ROWS]),
            footprint=footprint(memory.counters.as_dict()),
        )
