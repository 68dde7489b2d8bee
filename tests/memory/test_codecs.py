"""Every codec of the registry: a record reads back as what its writer was told, and as its block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from freekv_kernels import CODECS
from freekv_kernels.records import records_at
from sglang_freekv.algorithm.audit import audit_blocks, audit_index
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.host_store import HostStore
from tests.support.random_traces import make_trace
from tests.support.reference_checks import ReferenceChecks
from tests.support.simulated_requests import PAGE, SimulatedEngine

GEOMETRY = Geometry(num_layers=3, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)


@pytest.fixture(params=CODECS)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return replace(GEOMETRY, codec=CODECS[request.param])


def test_tokens_read_back_as_their_writer_was_told_and_no_other_record_changes(geometry):
    store = HostStore(geometry, 5, "cpu")
    store.kv.zero_()
    host_kv, pages, offsets = store.kv[:, 1], torch.tensor([2, 4, 2]), torch.tensor([7, 0, 8])
    kv = torch.randn(3, 2, 2, 16)
    written = geometry.codec.write_tokens(host_kv, pages, offsets, kv)
    decoded = geometry.codec.decode(host_kv, geometry.dtype)  # [num_host_pages, num_kv_heads, 2, page_size, head_dim]
    for token, (page, offset) in enumerate(zip(pages.tolist(), offsets.tolist(), strict=True)):
        assert torch.equal(decoded[page, :, :, offset], written[token])
    untouched = store.kv[:, [0, 2]], store.kv[[0, 1, 3]]
    assert not any(part.view(torch.uint8).any() for part in untouched)


def test_the_keys_of_pages_are_those_of_their_records(geometry):
    store = HostStore(geometry, 5, "cpu")
    tokens = PAGE * 5
    pages, offsets = torch.arange(tokens) // PAGE, torch.arange(tokens) % PAGE
    geometry.codec.write_tokens(store.kv[:, 2], pages, offsets, torch.randn(tokens, 2, 2, 16))
    chosen = torch.tensor([3, 0])
    records = geometry.codec.decode(store.kv[chosen, 2], geometry.dtype)
    assert torch.equal(geometry.codec.decode_keys(store.kv[:, 2], chosen, geometry.dtype), records[:, :, 0])
    heads = torch.tensor([1, 0])
    gathered = geometry.codec.decode(records_at(store.kv[:, 2], chosen, heads), geometry.dtype)
    assert torch.equal(gathered, records[[0, 1], heads])


def test_a_page_takes_the_bytes_that_the_geometry_says(geometry):
    assert HostStore(geometry, 5, "cpu").nbytes == 5 * geometry.page_bytes


class BlocksAlone(ReferenceChecks):
    """What holds of any codec; the reference knows the model's own numbers only."""

    def output(self, *_) -> None: ...
    def windows(self, *_) -> None: ...
    def host_pages(self, *_) -> None: ...
    def flags(self, *_) -> tuple[int, int]:
        return 0, 0


def test_a_block_is_what_its_record_reads_back_as_through_prefill_decode_and_recall(geometry):
    config = FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, arena_tokens=3 * PAGE)
    engine = SimulatedEngine(geometry, config, max_requests=1)  # few blocks
    engine.checks = BlocksAlone(engine.memory, engine.rule)
    request = engine.start(make_trace(geometry, 12 * PAGE, seed=0), 9 * PAGE - 3)
    engine.prefill([(request, 4 * PAGE + 5)])
    engine.prefill_whole(request)
    for _ in range(PAGE):
        engine.decode()
        audit_blocks(engine.memory)
    counted = engine.memory.counters.as_dict()
    assert counted["recalled_bytes"] > 0 and counted["recalled_bytes"] % geometry.record_bytes == 0
    if geometry.codec is CODECS["plain"]:
        audit_index(engine.memory, torch.tensor(request.pages), request.groups)
