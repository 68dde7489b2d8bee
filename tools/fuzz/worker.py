"""What a process of the fuzz runs. Python does not import a package's `__main__` in the processes that it spawns."""

from __future__ import annotations

import traceback


def start() -> None:
    import torch

    torch.set_num_threads(1)  # the tensors are tiny


def run(seed: int, of_baselines: bool) -> tuple[int, str | None]:
    """The steps of a round, and what failed."""
    from tools.fuzz.explore import run_round, serving_context
    from tools.fuzz.setups import BASELINE_SETUPS, SETUPS

    try:
        with serving_context():
            return run_round(seed, BASELINE_SETUPS if of_baselines else SETUPS), None
    except Exception:
        return 0, traceback.format_exc()
