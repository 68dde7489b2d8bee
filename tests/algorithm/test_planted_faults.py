"""The audit and the integrity check raise for every fault that is planted, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from freekv_kernels import Count, PageStore
from sglang_freekv.algorithm.audit import AuditError, audit_blocks, audit_index, audit_windows
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from tests.support import fp8
from tests.support.random_traces import make_trace
from tests.support.simulated_requests import PAGE, SimulatedEngine
from tests.support.small_engine import two_requests

GEOMETRY = Geometry(num_layers=1, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
# With two levels, as then groups of pages have bounds, too.
CONFIG = FreeKVConfig(
    budget_tokens=4 * PAGE, max_budget_tokens=5 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, candidates=5
)


@pytest.fixture
def engine() -> SimulatedEngine:
    return two_requests(GEOMETRY, CONFIG)


def audit(engine: SimulatedEngine) -> None:
    audit_blocks(engine.memory)
    audit_index(engine.memory, torch.tensor(engine.requests[0].pages), engine.requests[0].groups)
    audit_windows(engine.decoder)


def front(engine: SimulatedEngine, request: int = 0) -> torch.Tensor:
    """The window that the last step read, of KV head 1 of a request."""
    return engine.front(0)[engine.requests[request].row, 1]


def corrupt_block(engine: SimulatedEngine) -> None:
    page = engine.requests[0].pages[0]
    engine.memory.blocks.kv[0][int(engine.memory.blocks.tables.table[0, page, 1]), 1, 31, 15] += 1


def corrupt_host_page(engine: SimulatedEngine) -> None:
    engine.memory.host.kv[engine.requests[1].pages[2], 0, 0, 0, 4, 0] += 1


def keep_old_block_of_reused_page(engine: SimulatedEngine) -> None:
    page, host = engine.requests[0].pages[1], engine.memory.host
    host.mark_filled(torch.tensor([page * PAGE]))
    host.kv[page, 0, :, :, 0] = 1


def lose_recent_page(engine: SimulatedEngine) -> None:
    front(engine)[3] = -1


def lose_sink_page(engine: SimulatedEngine) -> None:
    front(engine)[0] = 1


def lose_selected_page(engine: SimulatedEngine) -> None:
    window = front(engine)
    window[1:4] = torch.tensor([window[2], window[3], -1])


def list_page_twice(engine: SimulatedEngine) -> None:
    front(engine)[2] = front(engine)[1]


def exceed_budget(engine: SimulatedEngine) -> None:
    front(engine)[4] = 10


def lose_page_within_budget(engine: SimulatedEngine) -> None:
    front(engine, request=1)[1] = -1


def select_another_page(engine: SimulatedEngine) -> None:
    row, pages = engine.requests[0].row, range(1, 7)
    back = engine.back(0)[row, 1]
    selected = set(back[1:3].tolist())
    back[1:3] = torch.tensor(sorted(page for page in pages if page not in selected)[:2])


def corrupt_summary(engine: SimulatedEngine) -> None:
    engine.memory.index.summaries[0, engine.requests[0].pages[2], 0, 1, 5] += 1


def keep_own_bounds_at_the_end_of_a_group(engine: SimulatedEngine) -> None:
    page, index = engine.requests[0].pages[7], engine.memory.index
    keys = engine.memory.host.kv[page, 0, :, 0]
    index.summaries[0, page] = fp8.bounds(torch.stack((keys.amin(1), keys.amax(1)), 1))


def corrupt_code(engine: SimulatedEngine) -> None:
    engine.memory.index.codes[0, engine.requests[0].pages[2], 1, 4, 3] ^= 1


def run_with_absent_page(engine: SimulatedEngine) -> None:
    engine.memory.counters.values[Count.ABSENT_PAGES] += 1


AUDIT_FAULTS = (
    corrupt_block,
    corrupt_host_page,
    keep_old_block_of_reused_page,
    lose_recent_page,
    lose_sink_page,
    lose_selected_page,
    list_page_twice,
    exceed_budget,
    lose_page_within_budget,
    select_another_page,
    corrupt_summary,
    keep_own_bounds_at_the_end_of_a_group,
    corrupt_code,
    run_with_absent_page,
)


@pytest.mark.parametrize("plant", AUDIT_FAULTS, ids=lambda fault: fault.__name__)
def test_the_audit_is_silent_until_a_fault_is_planted(
    engine: SimulatedEngine, plant: Callable[[SimulatedEngine], None]
) -> None:
    audit(engine)
    plant(engine)
    with pytest.raises(AuditError):
        audit(engine)


def skip_encoding(engine: SimulatedEngine) -> None:
    """Codes are written nowhere; bounds of groups, which the same ops write, are."""
    ops = engine.memory.ops

    def skip(slots: torch.Tensor, store: PageStore, codes: torch.Tensor, groups: torch.Tensor | None = None) -> None:
        ops.encode_pages(slots, store, codes.clone(), groups)

    def skip_in_step(*args: object) -> None:
        *appended, codes, groups, pace, due = args
        ops.append_tokens(*appended, None if codes is None else codes.clone(), groups, pace, due)

    engine.memory.ops = ops._replace(encode_pages=skip, append_tokens=skip_in_step)


def test_codes_that_prefill_leaves_to_the_last_owner_of_a_page_are_noticed(
    engine: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = engine.requests[0]
    engine.leave(old)
    newcomer = engine.start(make_trace(GEOMETRY, 10 * PAGE, seed=2), 8 * PAGE + 1)
    skip_encoding(engine)
    with pytest.raises(AssertionError, match="codes of page"):
        engine.prefill_whole(newcomer)
    assert set(newcomer.pages) <= set(old.pages)
    with pytest.raises(AuditError, match="wrong codes"):
        audit_index(engine.memory, torch.tensor(newcomer.pages), newcomer.groups)
    monkeypatch.setattr(engine.checks, "host_pages", lambda request: None)
    with pytest.raises(AssertionError, match="worse by"):  # the windows alone give it away
        for _ in range(20):
            engine.decode()


def test_codes_that_no_step_writes_when_it_fills_a_page_are_noticed(engine: SimulatedEngine) -> None:
    request = engine.requests[0]
    skip_encoding(engine)
    while (request.length + 1) % PAGE:
        engine.decode()
    with pytest.raises(AssertionError, match="codes of page"):
        engine.decode()
    with pytest.raises(AuditError, match="wrong codes"):
        audit_index(engine.memory, torch.tensor(request.pages), request.groups)


def test_the_audit_ignores_what_lies_behind_the_last_token(engine: SimulatedEngine) -> None:
    page = engine.requests[0].pages[-1]
    block = int(engine.memory.blocks.tables.table[0, page, 0])
    engine.memory.blocks.kv[0][block, :, int(engine.memory.host.filled[page]) :] = 7
    audit(engine)


def own_twice(engine: SimulatedEngine) -> None:
    blocks = engine.memory.blocks.tables
    used, free = (blocks.owner[0] >= 0).nonzero()[0], (blocks.owner[0] < 0).nonzero()[0]
    blocks.owner[0][free] = blocks.owner[0][used]


def lose_table_entry(engine: SimulatedEngine) -> None:
    engine.memory.blocks.tables.table[0, engine.requests[0].pages[0], 0] = -1


def swap_table_entries(engine: SimulatedEngine) -> None:
    entries = engine.memory.blocks.tables.table[0, engine.requests[0].pages[0]]
    entries.copy_(entries.flip(0))


def share_block_between_pages(engine: SimulatedEngine) -> None:
    table, pages = engine.memory.blocks.tables.table, engine.requests[0].pages
    table[0, pages[1], 0] = table[0, pages[0], 0]


def free_block_without_forgetting_it(engine: SimulatedEngine) -> None:
    block = int(engine.memory.blocks.tables.table[0, engine.requests[0].pages[0], 0])
    engine.memory.blocks.tables.owner[0][block] = -1


def stamp_free_block(engine: SimulatedEngine) -> None:
    blocks = engine.memory.blocks.tables
    blocks.last_used[0][(blocks.owner[0] < 0).nonzero()[0]] = 3


def free_block_twice(engine: SimulatedEngine) -> None:
    free, num_free = engine.memory.blocks.tables.free_blocks[0], engine.memory.blocks.tables.num_free[0]
    free[num_free] = free[0].clone()
    num_free += 1


def lose_free_block(engine: SimulatedEngine) -> None:
    engine.memory.blocks.tables.num_free[0] -= 1


def overfill_page(engine: SimulatedEngine) -> None:
    engine.memory.host.filled[engine.requests[0].pages[0]] = PAGE + 1


INTEGRITY_FAULTS = (
    own_twice,
    lose_table_entry,
    swap_table_entries,
    share_block_between_pages,
    free_block_without_forgetting_it,
    stamp_free_block,
    free_block_twice,
    lose_free_block,
    overfill_page,
)


@pytest.mark.parametrize("plant", INTEGRITY_FAULTS, ids=lambda fault: fault.__name__)
def test_the_integrity_check_is_silent_until_a_fault_is_planted(
    engine: SimulatedEngine, plant: Callable[[SimulatedEngine], None]
) -> None:
    engine.memory.check_integrity()
    plant(engine)
    with pytest.raises(RuntimeError):
        engine.memory.check_integrity()
