"""The checks of the GPU suite notice what is wrong, and what it stands on does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import host_order
from benchmarks.gpu.claim_stress import Launch
from benchmarks.gpu.session import Session
from freekv_kernels import BlockTables, Count
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
