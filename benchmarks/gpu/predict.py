"""Phase predict: what the cost model says of every step and scan of this stage, written down before one is measured.

A step of the suite has no sampling and no host, so neither has its prediction. The traffic is that of the default rule
on a language model, which the queries of phase layer are made to have; or none, where they stand still.
"""

from __future__ import annotations

import torch

from benchmarks.cost_model.cards import CARDS, H200, Card, card_named
from benchmarks.cost_model.gpu_step import GPUStep, full_attention, gpu_step, scan_seconds, under, window_only
from benchmarks.cost_model.launches import KERNEL_S, OWN_S, STEP_S, rows_seconds
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.step_time import Setting
from benchmarks.cost_model.traffic import Traffic, measured_traffic
from benchmarks.gpu.decode_cells import MOVING, REHEARSED_STEP_CELLS, STEP_CELLS, STILL
from benchmarks.gpu.session import Session
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import num_pages_of

_NOTHING = Traffic(turnover=0.0, flagged_share=0.0, exposed_share=0.0, scored_share=1 / FreeKVConfig().score_interval)
_PARTS = ("launches", "scan", "correction", "exposed_link", "beside")


def run(session: Session) -> None:
    card = _card(session)
    if card is None:
        session.say(f"nothing is predicted: no card of {', '.join(CARDS)} is called {torch.cuda.get_device_name()}")
        return
    model = Model.of_shape(session.shape)
    for batch, context in REHEARSED_STEP_CELLS if session.is_rehearsal else STEP_CELLS:
        setting, cell = Setting(context, batch, session.config), {"batch": batch, "context": context}
        for mode, plain in (("full", full_attention(setting)), ("window", window_only(setting))):
            _record(session, gpu_step(card, model, plain), mode=mode, **cell)
        for drift, traffic in ((MOVING, measured_traffic()), (STILL, _NOTHING)):
            own = gpu_step(card, model, under(traffic, setting, model))
            _record(session, own, mode="freekv", **cell, moves=drift)
            for part in _PARTS if drift == MOVING else ():
                session.record("predicted_part", round(getattr(own, part) * 1e3, 4), "ms", part=part, **cell)
        rows, columns = batch * session.shape.kv_heads, num_pages_of(context, session.config.page_size)
        ops = {
            "score_pages": ("back, by mass", scan_seconds(card, model, setting, rows)),
            "correct_windows": ("every row", rows_seconds(card, rows, columns)),
        }
        for op, (kind, seconds) in ops.items():
            seconds += KERNEL_S + OWN_S.get(op, 0.0)
            session.record("predicted_kernel", round(seconds * 1e6, 2), "us", op=op, kind=kind, **cell)


def record_explained(session: Session, batch: int, context: int, drift: float, found: dict[str, float]) -> None:
    """After a step: the prediction for what it has scored, corrected and recalled, in place of a model's traffic.

    Parameters
    ----------
    found : dict
        Of `layer_step.traffic_of`. Who waited for recalls is not counted: the share of the language model's is taken.
    """
    card = _card(session)
    if card is None:
        return
    exposed = measured_traffic().exposed_share
    counted = (found["flagged"], found["recalled_mb"] * 1e6, exposed, found["scored"])
    setting = Setting(context, batch, session.config, *counted)
    seconds = gpu_step(card, Model.of_shape(session.shape), setting).seconds - STEP_S
    cell = {"mode": "freekv", "batch": batch, "context": context, "moves": drift}
    session.record("explained_step", round(seconds * 1e3, 4), "ms", **cell)


def _card(session: Session) -> Card | None:
    """A rehearsal is for the card that is rehearsed for."""
    return H200 if session.is_rehearsal else card_named(torch.cuda.get_device_name())


def _record(session: Session, step: GPUStep, **cell: int | float | str) -> None:
    session.record("predicted_step", round((step.seconds - STEP_S) * 1e3, 4), "ms", **cell)
