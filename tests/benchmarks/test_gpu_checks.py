"""The checks of the GPU suite notice what is wrong, and what it stands on does what it says."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import host_order
from benchmarks.gpu.claim_stress import Launch
from benchmarks.gpu.fetch_stress import Fetch
from benchmarks.gpu.session import Session
from freekv_kernels import REFERENCE, BlockTables, Count, Half
from sglang_freekv.attention.cpu import TorchWindowAttention
from sglang_freekv.memory.geometry import Geometry

ROOT = Path(__file__).parents[2]


def spoil_stamp(launch: Launch, tables: BlockTables, blocks: torch.Tensor) -> None:
    tables.last_used[blocks[blocks >= 0][0].long()] += 1


def spoil_entry(launch: Launch, tables: BlockTables, blocks: torch.Tensor) -> None:
    blocks[(blocks >= 0).nonzero()[0]] = -1


def spoil_table(launch: Launch, tables: BlockTables, blocks: torch.Tensor) -> None:
    tables.table[launch.wanted[(blocks >= 0).nonzero()[0]]] = -1


def spoil_owner(launch: Launch, tables: BlockTables, blocks: torch.Tensor) -> None:
    tables.owner[blocks[blocks >= 0][0].long()] = -1


def spoil_count(launch: Launch, tables: BlockTables, blocks: torch.Tensor) -> None:
    launch.counters[Count.EVICTIONS] += 1


def spoil_stack(launch: Launch, tables: BlockTables, blocks: torch.Tensor) -> None:
    tables.num_free.add_(1)


@pytest.mark.parametrize("spoil", [spoil_stamp, spoil_entry, spoil_table, spoil_owner, spoil_count, spoil_stack])
def test_a_claim_that_breaks_its_contract_is_noticed(spoil):
    for number in range(4):
        launch = Launch(number, 16, 24)
        tables, blocks = launch.run("cpu")
        assert launch.broken(tables, blocks) == []
        if (blocks >= 0).any():
            spoil(launch, tables, blocks)
            assert launch.broken(tables, blocks) != []


def test_claims_meet_scarce_and_plenty_blocks_and_pairs_that_are_listed_again():
    launches = [Launch(number, 64, 512) for number in range(60)]
    victims = [int(((x.last_used >= 0) & (x.last_used < 100 + x.claim.protect_back)).sum()) for x in launches]
    wanted = [len(x.wanted.unique()) for x in launches]
    can = [x.num_free + n for x, n in zip(launches, victims, strict=True)]
    assert any(c < w for c, w in zip(can, wanted, strict=True)) and any(c > w for c, w in zip(can, wanted, strict=True))
    assert all(len(x.wanted) > n for x, n in zip(launches, wanted, strict=True) if len(x.wanted) > 100)
    assert {x.claim for x in launches} == {*type(launches[0].claim)}


FETCHES = {Half.FRONT: 6, Half.BACK: 3, Half.BOTH: 2}  # numbers of launches in which some pages are not served


@pytest.fixture(scope="module", params=FETCHES.items(), ids=lambda of: of[0].name)
def fetched(request: pytest.FixtureRequest) -> tuple:
    half, number = request.param
    fetch = Fetch(number, 16, 32)
    assert fetch.half == half
    return fetch, fetch.run("cpu")


def test_a_fetch_keeps_its_contract_where_pages_are_listed_again_and_blocks_are_few(fetched):
    fetch, out = fetched
    assert fetch.broken(out) == []
    served = int((out.misses.blocks >= 0).sum())
    assert 0 < served < len(out.missing.unique()) <= len(out.missing)


def served_block(out) -> int:
    return int(out.misses.blocks[out.misses.blocks >= 0][0])


def held_at_first(fetch: Fetch, out) -> int:
    return int(((out.blocks.owner[0] == fetch.held_at_first) & (fetch.held_at_first >= 0)).nonzero()[0])


FETCH_FAULTS = {
    "a page is not copied": lambda f, out: out.block_kv[served_block(out)].fill_(torch.nan),
    "one element of a page is another's": lambda f, out: out.block_kv[served_block(out), -1].add_(1),
    "a page that was found is overwritten": lambda f, out: out.block_kv[held_at_first(f, out)].add_(1),
    "a pair has a block that it does not own": lambda f, out: out.blocks.table[0].view(-1)[int(out.missing[0])].add_(1),
    "a stamp of what is claimed is old": lambda f, out: out.blocks.last_used[0, served_block(out)].sub_(2),
    "a stamp of what stays is lost": lambda f, out: out.blocks.last_used[0, held_at_first(f, out)].sub_(1),
    "an owner is lost": lambda f, out: out.blocks.owner[0, served_block(out)].fill_(-1),
    "a miss is listed twice": lambda f, out: out.misses.pairs[:2].copy_(out.misses.pairs[:1].expand(2)),
    "a hit is not counted": lambda f, out: out.counters[Count.HITS].add_(1),
    "a recall is counted twice": lambda f, out: out.counters[Count.RECALLS].add_(1),
    "an eviction is not counted": lambda f, out: out.counters[Count.EVICTIONS].sub_(1),
    "a row did not arrive": lambda f, out: out.misses.progress[1].sub_(1),
}


@pytest.mark.parametrize("spoil", FETCH_FAULTS.values(), ids=FETCH_FAULTS)
def test_a_fetch_that_breaks_its_contract_is_noticed(fetched, spoil):
    fetch, out = fetched
    spoiled = deepcopy(out)
    spoil(fetch, spoiled)
    assert deepcopy(fetch).broken(spoiled) != []


def test_an_entry_that_names_another_block_is_noticed(fetched):
    fetch, out = fetched
    spoiled = deepcopy(out)
    spoiled.kv_indices[0] += 1
    assert (deepcopy(fetch).broken(spoiled) != []) == (fetch.half == Half.FRONT)


def one_request_after_the_other(*args) -> None:
    """What a fetch without its first wait may do: a row's blocks are taken before another row has looked up."""
    windows, batch, half, store, blocks, misses, counters, *_ = args
    found = []
    for i in range(len(batch.rows)):
        misses.count.zero_()
        REFERENCE.fetch_blocks(windows, batch.one(i), half, store, blocks, misses, counters)
        count = int(misses.count)
        found.append((misses.pairs[:count].clone(), misses.blocks[:count].clone()))
    pairs, claimed = (torch.cat(parts) for parts in zip(*found, strict=True))
    misses.pairs[: len(pairs)], misses.blocks[: len(pairs)] = pairs, claimed
    misses.count.fill_(len(pairs))


def test_rows_that_lose_their_blocks_to_earlier_ones_are_noticed(monkeypatch):
    from benchmarks.gpu import fetch_stress

    monkeypatch.setattr(
        fetch_stress, "triton_ops", lambda: REFERENCE._replace(fetch_blocks=one_request_after_the_other)
    )
    fetches = [fetch for fetch in (Fetch(number, 16, 32) for number in range(40)) if fetch.half == Half.BACK]
    faults = [fault for fetch in fetches for fault in fetch.broken(fetch.run("cpu"))]
    assert "what is missing is listed, each entry once" in faults


def test_a_recall_that_reads_before_append_has_written_is_noticed(tmp_path, monkeypatch):
    def early(written: host_order.WrittenPages) -> None:
        memory, layer = written.memory, written.layer
        memory.ops.recall_blocks(layer.store, written.misses, memory.counters.values)
        memory.append(layer, written.q, written.k, written.v, written.batch, None, None, True)

    monkeypatch.setattr(host_order.WrittenPages, "step", early)
    session = Session("host-order", tmp_path, 60, is_rehearsal=True)
    with pytest.raises(AssertionError, match=r"[1-9][0-9]* recalled elements and 0 bytes"):
        host_order.run(session)


@pytest.mark.parametrize(("group_size", "head_dim"), [(3, 64), (4, 128), (16, 96)])
def test_attention_that_stands_in_for_flashinfer_equals_torchs(group_size, head_dim, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # chosen when a kernel is defined
    from benchmarks.gpu.stand_in_attention import StandInAttention

    geometry = Geometry(1, 2 * group_size, 2, head_dim, torch.float16)
    lens, last = [5, 5, 1, 3, 7, 7], torch.tensor([32, 1, 7, 32, 31, 9], dtype=torch.int32)
    block_kv, q = torch.randn(60, 2, 32, head_dim).half(), torch.randn(3, 2, group_size, head_dim).half()
    indices, outputs = torch.randperm(60)[: sum(lens)].int(), []
    for attention in (StandInAttention(geometry, 3, 8), TorchWindowAttention(geometry, 3, 8)):
        attention.plan(lens)
        attention.kv_indices[: sum(lens)], attention.last_page_len[:6] = indices, last
        outputs.append(attention.run(q, block_kv, head_dim**-0.5))
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=2e-3)


def test_processes_share_tests_so_that_each_runs_once(tmp_path):
    names = [f"test_{number}" for number in range(30)]
    ran = tmp_path / "ran"
    lines = ["import pathlib, time", f"RAN = pathlib.Path({str(ran)!r})"]
    for name in names:
        lines += [f"def {name}():", f"    time.sleep(0.02); open(RAN, 'a').write('{name}\\n')"]
    (tmp_path / "test_shared.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.shared_tests", "--share-tests", tmp_path]
    command += ["--rootdir", tmp_path, tmp_path / "test_shared.py"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sorted(ran.read_text().split()) == sorted(names)
