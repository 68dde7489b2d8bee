"""The memory plan: everything fits, nothing is planned for what cannot run, and the numbers are the tensors'."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import pytest
import torch

from benchmarks.records import RESULTS, read_records
from freekv_kernels import GROUP_PAGES
from sglang_freekv.attention.cpu import TorchWindowAttention
from sglang_freekv.config import KEY_BITS, PAGE_SIZES, FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.flags import take_options
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.needs import workspace_bytes
from sglang_freekv.memory.page_indexes import INDEXES
from sglang_freekv.memory.plan import plan_memory
from sglang_freekv.memory.recalls import RECALLS
from sglang_freekv.memory.units import GIB, in_words
from sglang_freekv.memory.windows import WindowSizes
from sglang_freekv.serving import pool_sizes

CONFIG = FreeKVConfig()
LLAMA_8B = Geometry(
    num_layers=32, num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, key_bits=CONFIG.key_bits
)
CONTEXT = 131072
WINDOW = WindowSizes.of(CONFIG, LLAMA_8B.page_size).max_budget


def gpu_plan(config: FreeKVConfig = CONFIG, *, device_gib: float = 50, host_gib: float = 200, **changes):
    arguments = {"max_requests": 4096, "max_context": CONTEXT, "attention_bytes": 140 << 20, **changes}
    return plan_memory(
        LLAMA_8B, config, device_bytes=int(device_gib * GIB), host_bytes=int(host_gib * GIB), **arguments
    )


def device_total(plan) -> int:
    return (
        plan.device_blocks_bytes + plan.summaries_bytes + plan.arena_bytes + plan.windows_bytes + plan.workspace_bytes
    )


@pytest.mark.parametrize("max_requests", [1, 8, 64, 4096])
@pytest.mark.parametrize("device_gib", [16, 50, 110])
@pytest.mark.parametrize("host_gib", [4, 32, 200])
@pytest.mark.parametrize("windows", [2, 2.5, 4])
def test_everything_on_a_gpu_fits_and_every_request_has_its_windows(windows, device_gib, host_gib, max_requests):
    config = FreeKVConfig(windows=windows)
    plan = gpu_plan(config, device_gib=device_gib, host_gib=host_gib, max_requests=max_requests)
    assert device_total(plan) <= device_gib * GIB
    assert 1 <= plan.max_requests <= max_requests
    num_pairs = (plan.num_pages + 1) * LLAMA_8B.num_kv_heads
    own = windows * WINDOW * LLAMA_8B.num_kv_heads * plan.max_requests
    assert plan.num_blocks == num_pairs or plan.num_blocks >= own


@pytest.mark.parametrize("dense_layers", [(), (0,), (0, 31)])
def test_no_memory_is_left_that_one_more_request_would_need(dense_layers):
    plan = gpu_plan(FreeKVConfig(dense_layers=dense_layers), host_gib=64)
    one_more = (
        plan.request_bytes
        + workspace_bytes(LLAMA_8B, plan.config, CONTEXT, 1)
        - workspace_bytes(LLAMA_8B, plan.config, CONTEXT, 0)
    )
    blocks_of_requests = 2 * WINDOW * LLAMA_8B.num_kv_heads * plan.max_requests
    spare = (plan.num_blocks - blocks_of_requests) * (LLAMA_8B.num_layers - len(dense_layers)) * LLAMA_8B.block_bytes
    assert 50 * GIB - device_total(plan) + spare < one_more


def test_with_twice_the_windows_half_the_requests_run_in_blocks_of_a_given_size():
    few, many = (gpu_plan(FreeKVConfig(windows=windows, device_blocks_memory_gib=20)) for windows in (4, 2))
    assert few.num_blocks == many.num_blocks
    assert few.max_requests == many.max_requests // 2


def test_the_printed_plan_says_what_more_windows_buy():
    plan = gpu_plan(host_gib=64, device_gib=24)
    offered = dict(re.findall(r"--freekv-windows (\d) +([\d,]+) requests at most", plan.describe()))
    assert list(offered) == ["3", "4"]
    for windows, number in offered.items():
        run = gpu_plan(FreeKVConfig(windows=int(windows)), host_gib=64, device_gib=24).max_requests
        assert run - 1 <= int(number) <= run < plan.max_requests  # fewer requests leave memory for more blocks
    assert "--freekv-windows" not in gpu_plan(FreeKVConfig(windows=4), host_gib=64, device_gib=24).describe()


def test_where_everything_is_resident_more_windows_buy_nothing():
    assert "--freekv-windows" not in gpu_plan(host_gib=2, max_requests=200).describe()


def test_what_more_windows_save_is_what_was_measured():
    records = read_records(RESULTS / "device_cache_replay.jsonl")
    missed = {
        (record.params["churn"], record.params["windows"]): 1 - record.value
        for record in records
        if record.metric == "hit_share" and record.params["rule"] == "oldest of four"
    }
    churns = {churn for churn, _ in missed}
    for windows, recalls in RECALLS.items():
        shares = [missed[churn, windows] / missed[churn, 2] for churn in churns]
        assert recalls == pytest.approx(sum(shares) / len(shares), abs=0.005)


def test_a_part_of_a_window_is_whole_blocks_of_every_head():
    config = FreeKVConfig(budget_tokens=1056, windows=2.5)  # 33 pages
    window_bytes = [gpu_plan(dataclasses.replace(config, windows=windows)).request_bytes for windows in (2, 2.5)]
    more = window_bytes[1] - window_bytes[0]
    assert more == (83 - 66) * LLAMA_8B.num_kv_heads * LLAMA_8B.num_layers * LLAMA_8B.block_bytes


def test_thousands_of_requests_that_cannot_run_cost_no_blocks():
    few, many = gpu_plan(max_requests=gpu_plan().max_requests), gpu_plan(max_requests=100_000)
    assert many == few


def test_no_more_requests_are_planned_for_than_have_a_page_each():
    page_gib = LLAMA_8B.page_bytes / GIB
    few, many = (gpu_plan(FreeKVConfig(host_memory_gib=n * page_gib), device_gib=24) for n in (14, 1400))
    assert (few.num_pages, few.max_requests) == (13, 13)
    assert 13 < many.max_requests <= many.num_pages == 1399
    window_bytes = few.request_bytes - 2 * WINDOW * LLAMA_8B.num_kv_heads * 32 * LLAMA_8B.block_bytes
    assert few.windows_bytes == 14 * window_bytes  # and of row 0, which is padding
    on_cpu = plan_memory(LLAMA_8B, few.config, device_bytes=24 * GIB, host_bytes=GIB, max_requests=4096)
    assert on_cpu.max_requests == 13


def test_a_store_that_fits_on_the_device_bounds_the_requests_by_their_buffers_only():
    plan = gpu_plan(host_gib=2, max_requests=200)
    assert plan.num_blocks == (plan.num_pages + 1) * LLAMA_8B.num_kv_heads
    assert plan.max_requests == 200 > plan.device_blocks_bytes // plan.request_bytes


def test_blocks_of_a_given_size_leave_room_for_the_buffers():
    plan = gpu_plan(FreeKVConfig(device_blocks_memory_gib=20), host_gib=2, device_gib=24)
    assert device_total(plan) <= 24 * GIB


@pytest.mark.parametrize("candidates", [0, 5])
@pytest.mark.parametrize("dense_layers", [(), (0,)])
def test_the_workspace_is_what_the_memory_and_the_attention_allocate(dense_layers, candidates):
    max_requests, config = 3, FreeKVConfig(dense_layers=dense_layers, candidates=candidates)
    max_pages = CONTEXT // 32
    sizes = {"num_host_pages": 2, "num_blocks": 2, "max_requests": max_requests, "max_context": CONTEXT}
    memory = KVMemory(LLAMA_8B, config, **sizes)
    tables = memory.tables
    of_batch = [tensor for tensor in tables._batch if tensor is not memory.blocks.step]
    tensors = [*of_batch, *tables._flags, *tables._due, *tables._misses[0], *tables._misses[1], tables.opened.pairs]
    rows, num_listed = max_requests * LLAMA_8B.num_kv_heads, memory.sizes.num_listed(candidates, max_pages)
    assert (num_listed is None) == (candidates == 0)
    columns = max_pages if num_listed is None else max(num_listed, max_pages // GROUP_PAGES)
    scores = torch.empty((rows, LLAMA_8B.group_size, columns), device="meta")  # of both streams; a CPU keeps none
    tensors.append(torch.empty((rows, LLAMA_8B.group_size, LLAMA_8B.head_dim), dtype=LLAMA_8B.dtype, device="meta"))
    tensors += [scores, scores, *[torch.empty((rows, num_listed or 0), dtype=torch.int32, device="meta")] * 2]
    for width in (WINDOW, *([max_pages] if dense_layers else [])):
        attention = TorchWindowAttention(LLAMA_8B, max_requests, width)
        tensors += [attention.kv_indptr[1:], attention.kv_indices, attention.last_page_len]
    assert workspace_bytes(LLAMA_8B, config, CONTEXT, max_requests) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("key_bits", KEY_BITS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_what_is_planned_for_a_page_is_what_pages_are_selected_by(page_size, key_bits):
    geometry = Geometry(3, 6, 2, 24, torch.bfloat16, page_size, key_bits)
    index = INDEXES["codes" if key_bits else "min-max"]
    assert index(geometry, 5, "cpu").nbytes == 5 * index.page_bytes(geometry)


def test_the_codes_of_a_key_must_be_whole_bytes():
    with pytest.raises(ValueError, match=r"^--freekv-key-bits is 1, .* 20 elements of a key; give "):
        dataclasses.replace(LLAMA_8B, head_dim=20, key_bits=1)


def test_the_geometry_owns_the_page_size_and_the_bits_of_codes():
    sizes = {"num_host_pages": 2, "num_blocks": 2, "max_requests": 1, "max_context": 1024}
    memory = KVMemory(dataclasses.replace(LLAMA_8B, page_size=16, key_bits=4), CONFIG, **sizes)
    assert (memory.max_pages, memory.sizes.budget * 16) == (64, CONFIG.budget_tokens)
    assert memory.index.codes.shape[3:] == (16, 64)
    with pytest.raises(ValueError, match="An index of codes needs bits"):
        KVMemory(dataclasses.replace(LLAMA_8B, key_bits=0), CONFIG, **sizes)


def test_a_gpu_that_cannot_run_one_request_is_refused_with_the_flags_to_change():
    with pytest.raises(ValueError, match=r"cannot hold one request.*--mem-fraction-static.*--freekv-budget"):
        gpu_plan(device_gib=1, host_gib=8)
    with pytest.raises(ValueError, match="cannot hold one request"):
        gpu_plan(device_gib=0.1)


def test_device_blocks_that_do_not_fit_beside_the_other_pools_are_refused_with_what_is_left():
    with pytest.raises(
        ValueError, match=r"take 40.0 GiB, but 1\d\.\d GiB .* left .* lower --freekv-device-blocks-memory"
    ):
        gpu_plan(FreeKVConfig(device_blocks_memory_gib=40), host_gib=64, device_gib=24)


def test_more_device_blocks_than_the_store_has_pages_are_not_made():
    plan = gpu_plan(FreeKVConfig(device_blocks_memory_gib=1000), host_gib=2, device_gib=24)
    assert plan.num_blocks == (plan.num_pages + 1) * LLAMA_8B.num_kv_heads
    assert device_total(plan) <= 24 * GIB


def test_the_printed_plan_of_a_gpu_says_what_stays_on_the_device():
    plan = gpu_plan()
    text = plan.describe()
    resident = plan.num_blocks // LLAMA_8B.num_kv_heads * 32
    assert f"{resident:,} of the {plan.num_tokens:,} tokens fit on the device" in text
    assert re.search(rf"step workspace +{in_words(plan.workspace_bytes)} ", text)
    assert re.search(rf"host store +{in_words(plan.host_bytes)} ", text)
    assert all(len(line) < 160 for line in text.splitlines())


def test_a_plan_is_reported_with_the_settings_as_resolved_and_in_json():
    plan = gpu_plan(FreeKVConfig(dense_layers=(0, 31), host_memory_gib=8), device_gib=50)
    report = json.loads(json.dumps(plan.report()))
    assert report["config"]["freekv_host_memory"] == pytest.approx(8, rel=1e-3)
    assert report["config"]["freekv_dense_layers"] == [0, 31]
    assert report["config"]["freekv_max_budget"] == report["config"]["freekv_budget"] == 2048
    rule = ("selector", "gate", "tau", "hysteresis", "candidates", "group_pooling")
    assert [report["config"][f"freekv_{name}"] for name in rule] == ["mass", 0.02, None, 1.0, 0, None]
    assert report["memory_plan"]["host_bytes"] == plan.host_bytes
    # What was resolved can be given: the same plan comes out.
    given = {name: value for name, value in report["config"].items() if name != "page_size"}
    config, _ = take_options({"kv_retrieval": "freekv", **given})
    again = gpu_plan(config, device_gib=50)
    assert (again.num_pages, again.num_blocks) == (plan.num_pages, plan.num_blocks)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"tau": 0.7}, ("mass", None, 0.7, None)),
        ({"selector": "codes"}, ("codes", None, 0.9, "softmax")),
        ({"selector": "paper"}, ("paper", None, 0.8, "softmax")),
        ({"key_bits": 0}, ("min-max", None, 0.9, "softmax")),
    ],
    ids=str,
)
def test_the_rule_that_is_reported_is_the_one_in_force_and_can_be_given(settings: dict, rule: tuple):
    shown = FreeKVConfig(**settings).keywords()
    assert tuple(shown[f"freekv_{name}"] for name in ("selector", "gate", "tau", "group_pooling")) == rule
    page_size = shown.pop("page_size")
    given, rest = take_options({"kv_retrieval": "freekv", **shown})
    assert rest == {} and page_size == given.page_size
    assert given.keywords() == FreeKVConfig(**settings).keywords()


def test_a_plan_without_a_context_has_no_workspace_and_says_nothing_about_it():
    plan = plan_memory(LLAMA_8B, CONFIG, device_bytes=50 * GIB, host_bytes=64 * GIB, max_requests=16)
    assert plan.workspace_bytes == 0
    assert "workspace" not in plan.describe() and "fit on the device" not in plan.describe()
    window = plan.windows_bytes // (plan.max_requests + 1)
    blocks = 50 * GIB - plan.summaries_bytes - plan.arena_bytes - 17 * window
    assert plan.num_blocks == blocks // (LLAMA_8B.num_layers * LLAMA_8B.block_bytes)


def configurator(device: str, free_gib: float, dp_size: int = 1) -> types.SimpleNamespace:
    """What `plan_for` asks of SGLang's configurator, for a machine with two ranks, or two of each replica."""
    model = types.SimpleNamespace(
        num_attention_heads=32,
        head_dim=128,
        context_len=8192,
        get_num_kv_heads=lambda tp_size: 8 // tp_size,
        hf_config=types.SimpleNamespace(architectures=["LlamaForCausalLM"]),
        hf_text_config=types.SimpleNamespace(),
        is_local_attention_model=False,
        sliding_window_size=None,
    )
    return types.SimpleNamespace(
        device=device,
        gpu_id=0,
        model_config=model,
        server_args=types.SimpleNamespace(tp_size=2, dp_size=dp_size, nnodes=1),
        layer_info=types.SimpleNamespace(num_effective_layers=32),
        kv_cache_dtype=torch.bfloat16,
        pool_page_size=32,
        _profile_available_bytes=lambda pre_model_load_memory: int(free_gib * GIB),
    )


@pytest.fixture
def of_two_ranks(monkeypatch):
    monkeypatch.setattr(pool_sizes, "get_parallel", lambda: types.SimpleNamespace(attn_tp_size=2))
    monkeypatch.setattr(pool_sizes, "get_schedule", lambda: types.SimpleNamespace(max_total_tokens=None))
    monkeypatch.setattr(pool_sizes, "_agree", lambda plan, tp_size: plan)
    monkeypatch.setattr(pool_sizes, "free_host_bytes", lambda: 100 * GIB)
    monkeypatch.setattr(pool_sizes, "_attention_bytes", lambda geometry, gpu_id: 64 << 20)
    monkeypatch.setattr(pool_sizes.release, "extra_context_len", lambda server_args: 4)


def numa_nodes(monkeypatch, number: int) -> None:
    monkeypatch.setattr(pool_sizes, "get_cpu_ids_by_node", lambda: ["0,1"] * number)


@pytest.mark.usefixtures("of_two_ranks")
@pytest.mark.parametrize(("limit_gib", "expected_gib"), [(None, 40), (1000, 40), (50, 20)])
def test_without_a_gpu_ranks_share_what_their_container_has_left(limit_gib, expected_gib, monkeypatch):
    numa_nodes(monkeypatch, 2)
    monkeypatch.setattr(pool_sizes, "free_container_bytes", lambda: limit_gib and limit_gib * GIB)
    plan = pool_sizes.plan_for(configurator("cpu", 40), CONFIG, 0.0, 4)
    assert plan.workspace_bytes == 0
    assert plan.host_bytes == pytest.approx(0.6 * expected_gib * GIB, rel=0.01)
    assert device_total(plan) <= 0.4 * expected_gib * GIB


@pytest.mark.usefixtures("of_two_ranks")
@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 2, 16])
def test_without_a_gpu_all_ranks_of_all_replicas_take_what_the_machine_has_once(dp_size, nodes, monkeypatch):
    """SGLang says what a NUMA node has free."""
    numa_nodes(monkeypatch, nodes)
    monkeypatch.setattr(pool_sizes, "free_container_bytes", lambda: None)
    plan = pool_sizes.plan_for(configurator("cpu", 40, dp_size), CONFIG, 0.0, 4)
    ranks = 2 * dp_size
    taken = plan.host_bytes + 0.4 * (plan.host_bytes / 0.6)
    assert ranks * taken == pytest.approx(40 * GIB * min(nodes, ranks), rel=0.02)


@pytest.mark.usefixtures("of_two_ranks")
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_on_a_gpu_ranks_share_the_free_host_memory_and_plan_for_the_buffers_of_a_step(dp_size):
    plan = pool_sizes.plan_for(configurator("cuda", 30, dp_size), CONFIG, 0.0, 2048)
    assert 2 * dp_size * plan.host_bytes == pytest.approx(80 * GIB, rel=0.01)
    assert device_total(plan) <= 30 * GIB
    of_requests = workspace_bytes(plan.geometry, CONFIG, 8192 + 512, plan.max_requests)  # rounded up
    assert plan.workspace_bytes == of_requests + (64 << 20)


@pytest.mark.usefixtures("of_two_ranks")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_host_stores_beyond_the_free_memory_are_refused_before_all_else_with_asked_free_and_the_flag(device):
    config = FreeKVConfig(host_memory_gib=60)
    sentence = (
        r"The host stores of 2 rank\(s\) take 120 GiB, but 100 GiB of CPU memory are free; "
        r"lower --freekv-host-memory, which counts for each rank\."
    )
    with pytest.raises(UnsupportedConfiguration, match=f"^{sentence}$"):  # though nothing fits this device either
        pool_sizes.plan_for(configurator(device, 0.01), config, 0.0, 4)
