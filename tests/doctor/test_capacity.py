"""How many requests fit is asked of the plan that a server makes, by the doctor and by the cost model alike."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.cost_model.machine import DESKTOP, H100_X8, Machine
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.planning import best_freekv, best_plain
from benchmarks.cost_model.traffic import measured_traffic
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.doctor import forecast
from sglang_freekv.doctor.capacity import Rank, best_fit, gains_above, pages_of, plan_for_requests, planned_requests
from sglang_freekv.doctor.forecast import Forecast, resolve
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.units import GIB

K = 1024
LLAMA_24GB = ["--gpu-memory-gb", "24", "--host-memory-gb", "256"]
SMALL_CHUNKS = ["--chunked-prefill-size", "2048"]  # SGLang's default for such a card depends on its release
CONFIG = FreeKVConfig()
GEOMETRY = Geometry(num_layers=32, num_qo_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, key_bits=2)
RANK = Rank(
    geometry=GEOMETRY,
    plain_token_bytes=GEOMETRY.token_bytes,
    device_bytes=5 * GIB,
    host_bytes=200 * GIB,
    max_requests=2048,
    max_context=129 * K,
    attention_bytes=128 << 20,
)


@pytest.mark.parametrize("length", [2 * K, 8 * K, 32 * K, 128 * K])
def test_the_best_store_holds_its_requests_and_none_holds_one_more(length: int):
    fit = best_fit(RANK, CONFIG, length)
    plan = RANK.plan(replace(CONFIG, host_memory_gib=fit.host_memory_gib))
    assert fit.num_requests > 0
    assert planned_requests(plan, length) == fit.num_requests
    for more in (0.5, 1, 2, 4, 8, 16):
        larger = replace(CONFIG, host_memory_gib=fit.host_memory_gib + more)
        assert not RANK.holds_one(larger) or planned_requests(RANK.plan(larger), length) <= fit.num_requests
    assert plan_for_requests(RANK, CONFIG, length, fit.num_requests + 1) == fit.limit == "device memory"


def test_too_little_host_memory_bounds_the_requests():
    fit = best_fit(replace(RANK, host_bytes=9 * GIB), CONFIG, 32 * K)
    assert (fit.num_requests, fit.limit) == (2, "host memory")


def test_a_store_that_the_user_sizes_is_left_as_it_is():
    fit = best_fit(RANK, replace(CONFIG, host_memory_gib=9.0), 32 * K)
    assert (fit.num_requests, fit.host_memory_gib) == (2, 9.0)


def test_a_rank_without_room_holds_nothing():
    empty = replace(RANK, device_bytes=-GIB)
    assert empty.plain_requests(K) == best_fit(empty, CONFIG, K).num_requests == 0
    assert gains_above(empty, CONFIG, 128 * K) is None


def test_plain_sglang_holds_as_many_tokens_as_the_device_has_bytes_for():
    assert RANK.plain_tokens == 5 * GIB // (128 * K)
    assert RANK.plain_requests(8 * K) == 40960 // (8 * K + 32) == 4
    assert replace(RANK, max_total_tokens=10_000).plain_requests(8 * K) == 1
    assert replace(RANK, max_requests=3).plain_requests(8 * K) == 3


def test_above_the_gain_more_requests_fit_at_every_length_and_right_below_it_they_do_not():
    def gains(length: int) -> bool:
        return best_fit(RANK, CONFIG, length).num_requests > RANK.plain_requests(length)

    start = gains_above(RANK, CONFIG, 128 * K)
    assert K < start < 16 * K
    assert all(gains(length) for length in range(start, 128 * K + 1, K))
    assert not gains(start - K)


def test_pages_count_the_one_that_the_next_token_opens():
    assert [pages_of(length, GEOMETRY) for length in (1, 32, 33)] == [2, 2, 3]


@pytest.mark.parametrize(("machine", "tp", "gpu_gib"), [(DESKTOP, 1, 24), (H100_X8, 1, 80), (H100_X8, 8, 80)])
def test_the_cost_model_takes_the_share_of_a_gpu_that_sglang_takes(machine: Machine, tp, gpu_gib, folder_of):
    where = forecast.Machine(gpu_gib * GIB, 2048 * GIB)
    chunks = SMALL_CHUNKS if machine is DESKTOP else []
    server_args, _ = resolve(["--model-path", folder_of("llama-3.1-8b"), "--tp-size", str(tp), *chunks], where)
    assert machine.static_share == pytest.approx(server_args.mem_fraction_static, abs=0.012)


@cache
def doctors(folder: str) -> Forecast:
    where = forecast.Machine(24 * GIB, 256 * GIB)
    return forecast.forecast(*resolve(["--model-path", folder, *SMALL_CHUNKS], where), where)


@pytest.mark.parametrize("context", [8 * K, 32 * K, 128 * K])
def test_the_cost_model_and_the_doctor_count_the_same_requests(context: int, folder_of):
    model = Model.load("llama-3.1-8b")
    rank = replace(doctors(folder_of("llama-3.1-8b")).rank, max_requests=4096)
    predicted = best_freekv(DESKTOP, model, context, measured_traffic(), budget=2 * K, tp=1)
    assert predicted.most_requests == best_fit(rank, CONFIG, context).num_requests > 0
    plain = best_plain(DESKTOP, model, context, tp=1)
    assert (plain.most_requests if plain else 0) == rank.plain_requests(context)


def test_the_report_compares_with_plain_sglang_and_ends_in_a_command(folder_of, diagnose):
    folder = folder_of("llama-3.1-8b")
    flags = ["--model-path", folder, "--freekv-budget", "1024", *SMALL_CHUNKS]
    _, report = diagnose(*flags, *LLAMA_24GB, "--request-tokens", "16384")
    plain, planned, gib, best = re.search(
        r"plain SGLang would hold [\d,]+ tokens, (\d+) requests of 16,384; this [\d,]+, and (\d+) such requests\n"
        r"  with --freekv-host-memory ([\d.]+), which is what these requests need, (\d+):",
        report,
    ).groups()
    assert int(plain) < int(planned) < int(best)
    assert re.search(r"it holds more requests than plain SGLang above a context of [\d,]+ tokens\n", report)
    words = ["python", "-m", "sglang.launch_server", *flags, "--kv-retrieval", "freekv", "--freekv-host-memory", gib]
    assert f"\nCommand\n  {shlex.join(words)}\n" in report
    assert "counted from sizes" in report


def test_the_proposed_command_holds_what_it_promises(folder_of, diagnose):
    _, report = diagnose("--model-path", folder_of("llama-3.1-8b"), *SMALL_CHUNKS, *LLAMA_24GB)
    best = int(re.search(r"which is what these requests need, (\d+):", report)[1])
    command = shlex.split(report.partition("\nCommand\n")[2].splitlines()[0])
    status, again = diagnose(*command[3:], *LLAMA_24GB)
    assert status == 0
    assert f"and {best} such requests\n" in again
    assert shlex.split(again.partition("\nCommand\n")[2].splitlines()[0]) == command


def test_on_a_cpu_no_room_is_promised(folder_of, diagnose):
    flags = ["--host-memory-gb", "64", "--device", "cpu"]
    _, report = diagnose("--model-path", folder_of("llama-3.1-8b"), *flags)
    assert "on a CPU plain SGLang keeps its KV in the same memory: retrieval makes no room for more requests" in report
