"""Requests in mid-decode have the budget that is asked for now, not the one that the memory was built with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from benchmarks.gpu.decode_requests import give_first_windows, restart
from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.kv_memory import KVMemory

PAGE = 32


def test_a_cell_of_another_budget_has_it_in_the_tables_and_in_its_windows():
    geometry = Geometry(2, 4, 2, 16, torch.float32, PAGE, key_bits=2)
    config = FreeKVConfig(budget_tokens=8 * PAGE, max_budget_tokens=16 * PAGE)
    memory = KVMemory(geometry, config, num_host_pages=30, num_blocks=8, max_requests=1, max_context=28 * PAGE)
    _, prefill = build_engine(memory)
    memory.host.kv.zero_()
    memory.index.summaries.zero_()
    memory.index.codes.zero_()
    for budget in (16, 10):
        restart(memory, replace(config, budget_tokens=budget * PAGE), 70)
        table = torch.arange(28 * PAGE, dtype=torch.int32)[None].repeat(2, 1) + PAGE
        runner = SimpleNamespace(
            attn_backend=SimpleNamespace(prefill=prefill), req_to_token_pool=SimpleNamespace(req_to_token=table)
        )
        give_first_windows(SimpleNamespace(runner=runner, rows=torch.tensor([1]), seq_lens=torch.tensor([25 * PAGE])))
        assert memory.budgets.of(1) == memory.budgets.pages[1].tolist() == [budget] * 2
        assert ((memory.layers[1].windows[:, 1] >= 0).sum(-1) == budget).all()
