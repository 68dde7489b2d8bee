"""The doctor knows a model by its config.json: what is refused, what was never run, and what is no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.records import RESULTS, read_records
from sglang_freekv.doctor import forecast
from sglang_freekv.doctor.tested import TESTED_ARCHITECTURES

GPU = ["--gpu-memory-gb", "80", "--host-memory-gb", "512", "--weights-gb", "15"]
CONFIGS = json.loads((Path(__file__).parent / "model_configs.json").read_text())
REFUSED = {
    "deepseek-v3.2": "has multi-head latent attention (MLA), which has no keys per head. Remove --kv-retrieval",
    "qwen3-next": "has state-space or linear-attention layers. Remove --kv-retrieval",
    "falcon-h1": "has state-space or linear-attention layers. Remove --kv-retrieval",
    "llama-4": "has sliding-window layers, and FreeKV does not know which of them a model of its class has. Remove",
    "t5": "has cross-attention layers. Remove --kv-retrieval",
    "whisper": "has cross-attention layers. Remove --kv-retrieval",
    "llama-foo": "Cannot find model module. 'FooForCausalLM' is not a registered model",
    "unknown-kind": "has model type `foo` but Transformers does not recognize this architecture",
    "number-as-text": "Field 'num_attention_heads' expected int, got str (value: 'x')",
}


def result_of(report: str) -> list[str]:
    return report.partition("\nResult\n")[2].splitlines()


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_a_model_that_is_not_served_is_one_line_with_the_reason(name, reason, folder_of, diagnose):
    status, report = diagnose("--model-path", folder_of(name), *GPU)
    (line,) = result_of(report)
    assert status == 1
    assert reason in line


def test_a_model_whose_class_was_never_run_is_not_tested(folder_of, diagnose):
    status, report = diagnose("--model-path", folder_of("qwen2.5-vl"), *GPU)
    (line,) = result_of(report)
    assert status == 0
    assert "not tested: no model of Qwen2_5_VLForConditionalGeneration was ever run with KV retrieval" in line


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"llama-3.1-8b"}))
def test_nothing_is_in_the_way_of_tested_models_only(name, folder_of, diagnose):
    assert "nothing is in the way" not in diagnose("--model-path", folder_of(name), *GPU)[1]


def test_tested_architectures_are_those_of_the_records():
    run = {(r.params["device"], r.params["architecture"]) for r in read_records(RESULTS / "models.jsonl")}
    assert {(device, name) for device, names in TESTED_ARCHITECTURES.items() for name in names} == run


@pytest.mark.parametrize(
    ("files", "model_path", "reason"),
    [
        ({}, "nowhere", "which does not exist; give the folder of a checkpoint, with its config.json."),
        ({"a/readme": ""}, "a", "a folder without config.json; give the folder of a checkpoint"),
        ({"a/config.json": "{}"}, "a/config.json", "a file; give the folder of a checkpoint, with its config.json."),
        ({"a/config.json": "{not json"}, "a", "config.json cannot be read as JSON (Expecting property name"),
        ({"a/config.json": "[1]"}, "a", "config.json names no architectures, by which SGLang chooses the class"),
        ({"a/config.json": '{"model_type": "llama"}'}, "a", "config.json names no architectures"),
        ({"a/config.json": '{"architectures": []}'}, "a", "config.json names no architectures"),
    ],
)
def test_a_path_that_is_no_model_is_said_to_be_none(files, model_path, reason, tmp_path: Path, diagnose):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    status, report = diagnose("--model-path", str(tmp_path / model_path), *GPU)
    (line,) = result_of(report)
    assert status == 1
    assert str(tmp_path) in line and reason in line


def test_a_name_that_no_hub_has_is_said_to_be_neither(monkeypatch: pytest.MonkeyPatch, diagnose):
    def refuse(*args, **kwargs):
        raise OSError("cannot connect\nmore lines")

    monkeypatch.setattr("sglang.srt.configs.model_config.get_config", refuse)
    (line,) = result_of(diagnose("--model-path", "owner/model", *GPU)[1])
    assert "--model-path is 'owner/model': no folder, and no model of a hub could be had (cannot connect);" in line


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no driver"), KeyError("rope"), TypeError()])
def test_whatever_an_error_of_sglang_is_it_becomes_one_line(
    error, monkeypatch: pytest.MonkeyPatch, folder_of, diagnose
):
    def fail(*args):
        raise error

    monkeypatch.setattr(forecast.support, "check_settings", fail)
    status, report = diagnose("--model-path", folder_of("llama-3.1-8b"), *GPU)
    (line,) = result_of(report)
    assert status == 1
    assert type(error).__name__ in line and "test_models.py, line" in line
