"""Which layers have windows, and of how many tokens, follows from a model's configuration and SGLang's class of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sglang.srt.configs.model_config import ModelConfig

from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.serving.model_windows import sliding_windows
from sglang_freekv.serving.support import preset
from sglang_freekv.testing.tiny_sliding_model import TinySlidingModel

WINDOW = 100
EXPECTED = {
    "gemma2": (100, None, 100, None),
    "gemma3_text": (100, 100, None, 100),
    "gpt_oss": (100, None, 100, None),
    "cohere2": (101, 101, None, 101),  # SGLang shows a token more
    "exaone4": (100, 100, None, 100),
    "mistral": (),  # SGLang shows all
}


@pytest.fixture
def path(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TinySlidingModel(arch=request.param, window=WINDOW).hf_config()))
    return str(tmp_path)


@pytest.mark.parametrize(("path", "expected"), EXPECTED.items(), indirect=["path"], ids=EXPECTED)
def test_windows_are_those_of_sglangs_class(path: str, expected: tuple[int | None, ...]):
    assert sliding_windows(ModelConfig(path)) == expected


@pytest.mark.parametrize("path", EXPECTED, indirect=True)
def test_a_window_as_long_as_the_context_is_none(path: str):
    assert sliding_windows(ModelConfig(path, context_length=WINDOW)) == ()


@pytest.mark.parametrize("path", ["gpt_oss", "exaone4"], indirect=True)
class TestModelsThatSGLangServesUnderOtherNames:
    def test_the_name_is_preset_for_a_gpu(self, path: str):
        assert preset({"model_path": path, "device": "cuda"})["attention_backend"] == "triton"

    def test_another_one_is_refused_and_not_replaced(self, path: str):
        given = {"model_path": path, "device": "cuda", "attention_backend": "flashinfer"}
        with pytest.raises(UnsupportedConfiguration, match=r"does not serve .* with --attention-backend flashinfer"):
            preset(given)

    def test_a_cpu_does_not_serve_them(self, path: str):
        with pytest.raises(UnsupportedConfiguration, match="needs a GPU"):
            preset({"model_path": path, "device": "cpu"})
