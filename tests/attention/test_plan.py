"""Plans of decode attention, which hold until the page counts change."""

from __future__ import annotations

import pytest
import torch

from sglang_freekv.attention.cpu import TorchWindowAttention
from sglang_freekv.memory.geometry import Geometry


class Failing(TorchWindowAttention):
    """Fails to plan once."""

    num_plans = 0

    def _plan_rows(self, indptr: torch.Tensor) -> None:
        self.num_plans += 1
        if self.num_plans == 1:
            raise RuntimeError("no workspace")


def test_a_plan_that_failed_is_made_again_and_one_that_holds_is_not():
    attention = Failing(Geometry(1, 4, 2, 16, torch.float32), max_requests=2, max_pages=8)
    with pytest.raises(RuntimeError, match="no workspace"):
        attention.plan([3, 3])
    for _ in range(2):
        attention.plan([3, 3])
        assert attention.num_plans == 2
    attention.plan([3, 4])
    assert attention.num_plans == 3
