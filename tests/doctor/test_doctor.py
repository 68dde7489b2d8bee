"""The doctor says what would happen, without a GPU and without loading a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import sglang_freekv.doctor.__main__ as command
from freekv_patches import patch
from sglang_freekv.doctor.__main__ import main
from sglang_freekv.doctor.forecast import Machine, forecast, resolve
from sglang_freekv.memory.units import GIB
from sglang_freekv.testing.tiny_model import TinyModel

CONFIGS = json.loads((Path(__file__).parent / "model_configs.json").read_text())
H100 = ["--gpu-memory-gb", "79.6", "--host-memory-gb", "512", "--weights-gb", "15"]


@pytest.fixture(scope="module")
def llama(folder_of: Callable[[str], str]) -> str:
    """A model of 8 billion parameters, without its weights."""
    return folder_of("llama-3.1-8b")


def test_a_server_that_would_start_is_described(llama: str, diagnose: Callable):
    status, report = diagnose("--model-path", llama, *H100, "--freekv-budget", "4096")
    assert status == 0
    sections = [
        "Machine",
        "Packages",
        "Patches",
        "Model",
        "Note",
        "Settings",
        "Memory of each of 1 rank(s), on a GPU of 79.6 GiB",
        "Beside plain SGLang",
        "Command",
    ]
    assert [line for line in report.splitlines() if not line.startswith(" ")] == [*sections, "Result"]
    assert "32 layers, 32 query heads and 8 KV heads of 128, context 131,072 tokens" in report
    assert re.search(r"freekv_budget +4096\n", report) and re.search(r"freekv_host_memory +\d+\.?\d*\n", report)
    assert re.search(rf"sglang +{re.escape(version('sglang'))}\n", report)
    for pool in ("weights", "host store", "device blocks", "page summaries", "step workspace"):
        assert re.search(rf"{pool} +[\d.]+ [GM]iB", report), pool
    assert "nothing is in the way" in report
    assert "LlamaForCausalLM was run with KV retrieval, but not yet on cuda" in report


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_forecast_divides_the_memory_that_is_there(llama: str, tp_size: int):
    machine = Machine(gpu_bytes=int(79.6 * GIB), host_bytes=512 * GIB, weights_bytes=15 * GIB)
    server_args, config = resolve(["--model-path", llama, "--tp-size", str(tp_size)], machine)
    found = forecast(server_args, config, machine)
    plan = found.plan
    pools = (
        plan.device_blocks_bytes + plan.summaries_bytes + plan.arena_bytes + plan.windows_bytes + plan.workspace_bytes
    )
    assert found.weights_bytes == 15 * GIB // tp_size
    assert 0.95 * machine.gpu_bytes < found.weights_bytes + found.reserve_bytes + pools < machine.gpu_bytes
    assert plan.geometry.num_kv_heads == 8 // tp_size
    assert plan.host_bytes * tp_size < machine.host_bytes


def test_weights_are_read_off_the_files(tmp_path: Path):
    TinyModel(layers=2, dtype="float32").write(tmp_path)
    machine = Machine(gpu_bytes=16 * GIB, host_bytes=16 * GIB)
    server_args, config = resolve(["--model-path", str(tmp_path), "--dtype", "bfloat16"], machine)
    in_file = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # float32 in the file, of which the header is a small part, and 16 bits in memory.
    assert forecast(server_args, config, machine).weights_bytes == pytest.approx(in_file / 2, rel=0.01)


REFUSALS = {
    "a flag of SGLang's": (["--enable-mixed-chunk"], "--kv-retrieval freekv does not work with --enable-mixed-chunk"),
    "a setting": (["--freekv-budget", "100"], "--freekv-budget is 100; give tokens, a multiple of the page size"),
    "too much kept free": (
        ["--gpu-memory-gb", "24", "--mem-fraction-static", "0.6"],
        "SGLang keeps 40% free: nothing is left for KV. Raise --mem-fraction-static from 0.6 towards 0.9",
    ),
    "a GPU that no fraction helps": (
        ["--gpu-memory-gb", "8"],
        "The weights take 15.0 GiB of 7.50 GiB on each of 1 rank(s): no --mem-fraction-static leaves room for KV. Give "
        "--tp-size 4 on as many of these GPUs, a GPU of 20.0 GiB or more, or a smaller or quantized model.",
    ),
    "a GPU that is full of weights": (["--gpu-memory-gb", "16"], "no --mem-fraction-static leaves room for KV"),
    "a GPU that holds no request": (
        ["--gpu-memory-gb", "20", "--chunked-prefill-size", "2048"],
        "of device blocks cannot hold one request",
    ),
    "less CPU memory than asked for": (
        ["--freekv-host-memory", "200", "--host-memory-gb", "100"],
        "The host stores of 1 rank(s) take 200 GiB, but 100 GiB of CPU memory are free; lower --freekv-host-memory",
    ),
    "a data type": (["--dtype", "float32"], "needs a 16-bit model"),
    "ranks that cannot share the heads": (
        ["--tp-size", "3"],
        "--tp-size is 3, and ranks cannot share 32 query heads and 8 KV heads evenly; give one of 1, 2, 4, 8, 16, 32.",
    ),
    "a misspelt flag": (
        ["--freekv-bugdet", "64"],
        "--freekv-bugdet is no flag of the server; did you mean --freekv-budget?",
    ),
    "a misspelt flag of SGLang's": (
        ["--mem-fraction-statik=0.8"],
        "--mem-fraction-statik is no flag of the server; did you mean --mem-fraction-static?",
    ),
    "a misspelt flag of the doctor's": (
        ["--gpu-memry-gb", "80"],
        "--gpu-memry-gb is no flag of the server; did you mean --gpu-memory-gb?",
    ),
    "a flag that is like no other": (
        ["--zzz"],
        "--zzz is no flag of the server; see python -m sglang.launch_server --help.",
    ),
    "a value without a flag": (["8"], "'8' belongs to no flag"),
    "a value of the wrong kind": (
        ["--tp-size", "two"],
        "argument --tp-size/--tensor-parallel-size: invalid int value: 'two'.",
    ),
}


@pytest.mark.parametrize(("flags", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_would_be_refused_is_said_with_its_reason(llama: str, diagnose: Callable, flags, reason):
    status, report = diagnose("--model-path", llama, *H100, *flags)
    assert status == 1
    result = report.partition("\nResult\n")[2]
    assert reason in result
    assert len(result.splitlines()) == 1
    assert "Traceback" not in report


def test_a_model_that_is_not_served_is_named_with_the_part_that_is_in_the_way(tmp_path: Path, diagnose: Callable):
    config = CONFIGS["llama-3.1-8b"] | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "sliding_window": 4096,
        "use_sliding_window": True,
        "max_window_layers": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, report = diagnose("--model-path", str(tmp_path), *H100)
    assert status == 1 and "has sliding-window layers, and FreeKV does not know which" in report


def test_a_patch_that_does_not_fit_is_a_problem(monkeypatch: pytest.MonkeyPatch, diagnose: Callable):
    monkeypatch.setattr(command, "patch_status", lambda: (17, ["a.b: expected (self), found nothing"]))
    status, report = diagnose()
    assert status == 1
    assert "16 of 17 targets fit" in report and "- a patch does not fit: a.b: expected (self)" in report


def test_beside_another_sglang_the_doctor_names_it_and_asks_it_nothing(
    monkeypatch: pytest.MonkeyPatch, diagnose: Callable
):
    monkeypatch.setattr(patch, "version", lambda name: "0.5.20")
    status, report = diagnose("--model-path", "a folder that does not matter")
    assert status == 1
    assert "- FreeKV works with sglang 0.5.17 or 0.5.23, found 0.5.20; install one of them" in report
    assert "not checked: this is not the SGLang that FreeKV works with" in report


def test_without_a_model_only_the_installation_is_looked_at(diagnose: Callable):
    status, report = diagnose()
    assert status == 0
    assert "not checked: give --model-path" in report


def test_a_misspelt_flag_is_a_problem_without_a_model_too(diagnose: Callable):
    status, report = diagnose("--freekv-bugdet", "64")
    assert status == 1
    assert "did you mean --freekv-budget?" in report.partition("\nResult\n")[2]


@pytest.mark.parametrize("size", ["0", "-1", "many", "inf", "nan"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["--gpu-memory-gb", size])
    assert f"{size!r} is no size; give GiB, more than 0" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["0", "-1", "1.5", "long"])
def test_a_length_that_is_none_is_refused(length: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["--request-tokens", length])
    assert f"{length!r} is no length; give tokens, 1 or more" in capsys.readouterr().err
