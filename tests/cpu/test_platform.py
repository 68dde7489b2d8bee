"""SGLang on a CPU: when the platform is active, what it presets, and its paged allocator."""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.interface import SRTPlatform
from sglang.srt.server_args import ServerArgs

from sglang_freekv.cpu import platform
from sglang_freekv.releases import release
from tests.support.releases import of_release

THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"
needs_cpu_platform = pytest.mark.skipif(
    not isinstance(current_platform, platform.CpuPlatform), reason="another platform is active on this machine"
)


@pytest.fixture
def model_path(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.fixture
def no_choice(monkeypatch):
    """No accelerator, and nothing chosen in the environment, before or after."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(platform.CpuPlatform, "_dealt_cores", None)
    for name in ("SGLANG_USE_CPU_ENGINE", THREADS_BIND):
        monkeypatch.setenv(name, "")  # so that it is restored whatever the test does
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_platform_is_active_where_no_accelerator_exists(no_choice):
    assert issubclass(pkgutil.resolve_name(platform.activate()), SRTPlatform)


def test_the_platform_stays_away_where_an_accelerator_exists(no_choice):
    no_choice.setattr(torch.accelerator, "is_available", lambda: True)
    assert platform.activate() is None


def test_the_platform_stays_away_where_the_user_runs_the_cpu_engine_of_sglang(no_choice):
    no_choice.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_the_platform_stays_away_from_a_release_of_sglang_that_it_does_not_know(no_choice):
    no_choice.setattr(platform, "is_served_release", lambda: False)
    assert platform.activate() is None


def settings_of(**keywords) -> Any:
    """The settings of a plain server, as they are resolved."""
    server_args = ServerArgs(**keywords)
    release.resolve(server_args)
    return release.settings_of(server_args)


def test_beside_another_release_the_entry_point_can_be_loaded_whatever_that_release_lacks(no_choice):
    no_choice.setattr("importlib.metadata.version", lambda name: "0.5.20")
    for name in ("PlatformCapabilities", "KVPoolKind"):
        no_choice.delattr(f"sglang.srt.platforms.interface.{name}", raising=False)
    modules = [name for name in sys.modules if name.startswith("sglang_freekv.")]
    for name in modules:
        no_choice.delitem(sys.modules, name)
    assert import_module("sglang_freekv.cpu.platform").activate() is None


@needs_cpu_platform
@pytest.mark.parametrize("page_size", [None, 1, 32])
def test_plain_sglang_needs_no_flags(page_size, model_path, no_choice):
    server_args = settings_of(model_path=model_path, page_size=page_size)
    chosen = (server_args.device, server_args.attention_backend, server_args.sampling_backend)
    assert chosen == ("cpu", "torch_native", "pytorch")
    assert server_args.page_size == (page_size or 1)
    assert not hasattr(server_args, "_freekv")


@needs_cpu_platform
def test_an_attention_backend_that_the_user_names_is_kept(model_path, no_choice):
    assert settings_of(model_path=model_path, attention_backend="triton").attention_backend == "triton"


@needs_cpu_platform
@pytest.mark.parametrize(("named", "chosen"), [(None, "outlines"), ("llguidance", "llguidance"), ("none", "none")])
def test_the_grammar_backend_is_one_that_masks_on_a_cpu(named, chosen, model_path, no_choice):
    assert settings_of(model_path=model_path, grammar_backend=named).grammar_backend == chosen


@needs_cpu_platform
def test_a_grammar_backend_for_gpus_is_refused_with_a_sentence(model_path, no_choice):
    with pytest.raises(ValueError, match=r"--grammar-backend xgrammar masks tokens on a GPU only.*give outlines"):
        settings_of(model_path=model_path, grammar_backend="xgrammar")


@needs_cpu_platform
def test_each_server_of_a_process_gets_its_own_cores(model_path, no_choice):
    for num_ranks in (2, 4):
        settings_of(model_path=model_path, tp_size=num_ranks)
        assert len(os.environ[THREADS_BIND].split("|")) == num_ranks
    settings_of(model_path=model_path)
    assert THREADS_BIND not in os.environ


@needs_cpu_platform
def test_cores_that_the_user_dealt_are_kept(model_path, no_choice):
    no_choice.setenv(THREADS_BIND, "0|0")
    settings_of(model_path=model_path, tp_size=2)
    assert os.environ[THREADS_BIND] == "0|0"


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "expected"),
    [(4, 2, "0,1|2,3"), (5, 2, "0,1|2,3"), (2, 2, "0|1"), (1, 2, "0|0"), (2, 3, "0|1|0")],
)
def test_cores_are_dealt_in_runs_and_shared_where_they_are_short(num_cores, num_ranks, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    assert platform.split_cores(num_ranks) == expected


class Requests:
    """Requests of one allocator, as SGLang drives it: extend, decode, free."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.allocator = of_release.CpuAllocator(
            num_pages * page_size, page_size, torch.float32, "cpu", kvcache=None, need_sort=False
        )
        self.slots: list[torch.Tensor] = []  # of each request, int64 [tokens]

    def grow(self, num_tokens: list[int], *, decode: bool = False) -> torch.Tensor | None:
        """Give every request so many more tokens; None, and nothing changed, where pages are short."""
        before = torch.tensor([len(slots) for slots in self.slots])
        after = before + torch.tensor(num_tokens)
        last = torch.tensor([int(slots[-1]) if len(slots) else -1 for slots in self.slots])
        if decode:
            new = self.allocator.alloc_decode(after, after, last)
        else:
            new = self.allocator.alloc_extend(before, before, after, after, last, sum(num_tokens))
        if new is not None:
            parts = new.split(num_tokens)
            self.slots = [torch.cat(pair) for pair in zip(self.slots, parts, strict=True)]
        return new

    def check(self) -> None:
        """Positions of a page share a page of slots, in order, and no page has two owners or is free."""
        pages = []
        for slots in self.slots:
            position = torch.arange(len(slots))
            assert torch.equal(slots % self.page_size, position % self.page_size)
            starts = slots[:: self.page_size]
            assert torch.equal(slots - slots % self.page_size, starts[position // self.page_size])
            pages += (starts // self.page_size).tolist()
        pages += self.allocator.free_pages.tolist()
        assert sorted(pages) == list(range(1, self.allocator.num_pages + 1))  # page 0 is padding


growth = st.lists(st.one_of(st.none(), st.lists(st.integers(0, 70), min_size=3, max_size=3)), max_size=8)


@settings(max_examples=50, deadline=None)
@given(page_size=st.sampled_from(of_release.PAGE_SIZES), steps=growth)
def test_slots_stay_whole_pages_of_one_request_through_any_growth(page_size, steps):
    requests = Requests(num_pages=24, page_size=page_size)
    requests.slots = [torch.empty(0, dtype=torch.int64)] * 3
    for step in steps:
        free = requests.allocator.available_size()
        if step is not None:
            if requests.grow(step) is None:
                assert requests.allocator.available_size() == free
        elif all(len(slots) for slots in requests.slots):
            requests.grow([1, 1, 1], decode=True)
        requests.check()
    for slots in requests.slots:
        requests.allocator.free(slots)
    assert requests.allocator.available_size() == 24 * page_size


@settings(max_examples=50, deadline=None)
@given(lens=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=6))
def test_slots_are_those_of_the_reference_of_sglang(lens):
    page_size = 32
    prefix, extend = (torch.tensor(column) for column in zip(*lens, strict=True))
    last = torch.where(prefix > 0, 10_000 * page_size + prefix - 1, -1)
    allocator = of_release.CpuAllocator(64 * page_size, page_size, torch.float32, "cpu", kvcache=None, need_sort=False)
    expected = torch.empty(int(extend.sum()), dtype=torch.int64)
    alloc_extend_naive(prefix, prefix + extend, last, allocator.free_pages, expected, page_size, "cpu")
    slots = allocator.alloc_extend(prefix, prefix, prefix + extend, prefix + extend, last, len(expected))
    assert torch.equal(slots, expected)


@pytest.mark.parametrize(("decode", "num_tokens"), [(False, [33, 1]), (True, [1, 1])])
def test_a_short_store_gives_nothing_and_keeps_its_pages(decode, num_tokens):
    requests = Requests(num_pages=3, page_size=32)
    requests.slots = [torch.empty(0, dtype=torch.int64)] * 2
    assert requests.grow([32, 32]) is not None
    assert requests.grow(num_tokens, decode=decode) is None
    assert requests.allocator.available_size() == 32
    requests.check()


def test_released_pages_are_sorted_back_when_the_free_list_runs_short():
    allocator = of_release.CpuAllocator(4 * 32, 32, torch.float32, "cpu", kvcache=None, need_sort=True)
    allocator.free(allocator.alloc(4 * 32).flip(0))
    empty, full = torch.tensor([0]), torch.tensor([4 * 32])
    slots = allocator.alloc_extend(empty, empty, full, full, torch.tensor([-1]), 4 * 32)
    assert torch.equal(slots, torch.arange(32, 5 * 32))


@pytest.mark.parametrize(
    "environment, threads",
    [({}, 7), ({"SGLANG_CPU_OMP_THREADS_BIND": "0,1|2,3"}, 3), ({"OMP_NUM_THREADS": "8"}, 8)],
    ids=["one-rank", "two-ranks", "chosen-by-the-user"],
)
def test_a_rank_leaves_a_core_to_the_other_processes(environment, threads, monkeypatch):
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_NCCL_SO_PATH", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        platform.CpuPlatform().init_backend()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
