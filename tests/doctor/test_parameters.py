"""The size of a model's weights: from its files, as it is said, or estimated from its config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cost_model.model import MODELS
from sglang_freekv.doctor.parameters import count_parameters, estimate_weights_bytes

PUBLISHED = {
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-1.5b": 1_543_714_304,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}


def config_of(name: str) -> dict:
    return json.loads((MODELS / f"{name}.json").read_text())


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items(), ids=PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoint(name, expected):
    assert count_parameters(config_of(name)).total == expected


def test_every_expert_is_counted():
    assert count_parameters(QWEN3_MOE).total == 30_532_122_624


def test_weights_take_what_their_type_takes():
    config = config_of("llama-3.1-8b")
    assert estimate_weights_bytes(config, 2, None) == 2 * PUBLISHED["llama-3.1-8b"]


def test_quantized_layers_are_smaller_and_embeddings_are_not():
    config = config_of("llama-3.1-8b")
    counts, others = count_parameters(config), 2 * (2 * 128256 * 4096 + 4096)
    assert estimate_weights_bytes(config, 2, "fp8") == counts.layers + others
    four_bits = {"bits": 4, "group_size": 128}
    awq = estimate_weights_bytes(config | {"quantization_config": four_bits}, 2, "awq_marlin")
    assert awq == pytest.approx(counts.layers * (4 + 20 / 128) / 8 + others, abs=1)


@pytest.mark.parametrize(
    ("changes", "quantization"),
    [({"model_type": "foo"}, None), ({}, "w8a8_int8"), ({"quantization_config": {"bits": "4"}}, "awq")],
)
def test_what_is_not_known_is_not_estimated(changes, quantization):
    assert estimate_weights_bytes(config_of("llama-3.1-8b") | changes, 2, quantization) is None


def test_an_estimate_is_said_to_be_one(folder_of, diagnose):
    _, report = diagnose("--model-path", folder_of("llama-3.1-8b"), "--gpu-memory-gb", "80", "--host-memory-gb", "512")
    assert "15.0 GiB  estimated from config.json, as there are no files; --weights-gb says it exactly" in report


def test_where_no_estimate_can_be_made_the_flag_is_asked_for(folder_of, diagnose):
    status, report = diagnose(
        "--model-path", folder_of("qwen2.5-vl"), "--gpu-memory-gb", "80", "--host-memory-gb", "512"
    )
    assert status == 1
    assert "it cannot be estimated for this kind of model; give --weights-gb, the GiB of the whole model." in report


def test_help_says_when_the_size_of_the_weights_is_needed(capsys: pytest.CaptureFixture):
    from sglang_freekv.doctor.__main__ import main

    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "an estimate from its config.json" in text and "needed for others" in text


def test_the_models_of_the_table_have_their_class(folder_of):
    assert {path.stem for path in Path(MODELS).glob("*.json")} == set(PUBLISHED)
    assert all(config_of(name)["architectures"] for name in PUBLISHED)
