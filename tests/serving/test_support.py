"""Start-up: what is preset, and every model and setting that is refused with a sentence."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from sglang_freekv.algorithm.selectors import SELECTORS
from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.releases import release
from sglang_freekv.serving import support
from sglang_freekv.serving.model_support import check_model
from sglang_freekv.serving.support import RULES, check_resolved, preset
from tests.support.releases import of_release
from tools.sglang_releases.compatibility import Record

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
}
SERVED = {
    "llama": LLAMA,
    "qwen2 whose window is switched off": {**QWEN2, "sliding_window": 1024, "use_sliding_window": False},
    "mistral without a window": {**MISTRAL, "sliding_window": None},
    "mistral whose window is the context": {**MISTRAL, "sliding_window": 8192},
    "mistral with a window, which SGLang does not give its layers": {**MISTRAL, "sliding_window": 1024},
    "gemma 2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 64, "head_dim": 16},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
}
REFUSED = {
    "sliding window in upper layers": (
        {**QWEN2, "sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 2},
        "sliding-window layers",
    ),
    "MLA": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "num_key_value_heads": 8,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        "MLA",
    ),
    "cross attention": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 128,
            "decoder_layers": 2,
            "encoder_layers": 2,
            "decoder_attention_heads": 8,
            "encoder_attention_heads": 8,
        },
        "cross-attention",
    ),
    "encoder": (BERT, "attention to later tokens, as encoders have"),
    "encoder that ranks": ({**BERT, "architectures": ["BertForSequenceClassification"]}, "attention to later tokens"),
    "encoder of many languages": (
        {**BERT, "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"},
        "attention to later tokens",
    ),
    "decoder turned encoder": ({**QWEN2, "is_causal": False}, "attention to later tokens"),
}
# SGLang's own resolution refuses these on a CPU; on a GPU it lets them pass.
HYBRID = {
    "state space": {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"},
    "linear attention": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"},
}
GRAPHS = CudaGraphConfig(prefill=PhaseConfig("disabled"))
ON_GPU = argparse.Namespace(
    device="cuda", page_size=32, chunked_prefill_size=2048, cuda_graph_config=GRAPHS, tp_size=1, kv_cache_dtype="auto"
)
WIDE = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
# One case per rule, and one per setting that several values of are refused.
SETTINGS = [
    "--attention-backend triton",
    "--attention-backend fa3",
    "--prefill-attention-backend flashinfer",
    "--decode-attention-backend flashinfer",
    "--kv-cache-dtype fp8_e4m3",
    "--radix-cache-backend flexkv",
    "--enable-hierarchical-cache",
    "--enable-lmcache",
    "--enable-flexkv",
    "--enable-hisparse",
    "--prefill-only-disable-kv-cache",
    "--enable-unified-cache-external-linker",
    "--enable-unified-memory",
    "--enable-page-major-kv-layout",
    "--enable-memory-saver",
    "--kv-canary raise",
    "--enable-session-radix-cache",
    "--speculative-algorithm EAGLE",
    "--speculative-algorithm NGRAM",
    "--disaggregation-mode prefill",
    "--disaggregation-mode decode",
    "--enable-mixed-chunk",
    "--enable-mis",
    "--enable-torch-compile",
    "--cuda-graph-backend-decode breakable",
    "--cuda-graph-backend-decode tc_piecewise",
    "--cuda-graph-backend-prefill breakable",
    "--cuda-graph-backend-prefill full",
    "--debug-cuda-graph",
    "--enable-nvidia-megakernel",
    "--enable-two-batch-overlap",
    "--enable-single-batch-overlap",
    "--enable-pdmux",
    "--dllm-algorithm LowConfidence",
    "--pp-size 2",
    "--dcp-size 2",
    "--attn-cp-size 2",
    "--enable-prefill-cp",
    "--enable-prefill-context-parallel",
    "--enable-dp-attention",
    "--attn-dp-size 2",
    "--enable-kv-cache-sharding",
    "--use-ray",
    "--smg-grpc-mode",
    "--enable-deterministic-inference",
    "--rl-on-policy-target fsdp",
]


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    load_plugins()


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.fixture
def model(tmp_path: Path):
    """Write a model directory that holds a configuration and nothing else."""

    def write(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
        return str(tmp_path)

    return write


def start(parser: argparse.ArgumentParser, model_path: str, flags: str = "") -> Any:
    """The settings of a server, as they are resolved."""
    argv = ["--model-path", model_path, "--kv-retrieval", "freekv", *shlex.split(flags)]
    return release.settings_of(ServerArgs.from_cli_args(parser.parse_args(argv)))


def field_of(flags: str) -> str:
    return flags.split()[0].removeprefix("--").replace("-", "_")


SETTINGS_OF_RELEASE = [
    flags for flags in SETTINGS if field_of(flags) in release.defaults() and flags not in of_release.UNKNOWN_VALUES
]


@pytest.mark.parametrize("flags", SETTINGS_OF_RELEASE)
def test_a_setting_that_does_not_fit_ends_start_up_with_a_sentence(flags, parser, model):
    with pytest.raises(SystemExit) as exit:
        start(parser, model(LLAMA), flags)
    assert flags in exit.value.code
    assert exit.value.code.startswith("error: --kv-retrieval freekv does not work with ")
    assert exit.value.code.count("\n") == 0


def test_every_rule_is_tested_and_allows_the_default_of_sglang():
    defaults = release.defaults()
    rules = [rule for rule in RULES if rule.field in defaults]
    assert {rule.field: rule.allowed[0] for rule in rules} == {rule.field: defaults[rule.field] for rule in rules}
    assert {field_of(flags) for flags in SETTINGS} == {rule.field for rule in RULES}


def test_a_rule_is_about_a_setting_that_a_tested_release_has():
    known = [path for seams in Record.load().tested.values() for path in seams]
    assert [rule.field for rule in RULES if f"sglang.srt.server_args.ServerArgs.{rule.field}" not in known] == []


@pytest.mark.parametrize(("config", "obstacle"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_served_ends_start_up_with_a_sentence(config, obstacle, parser, model):
    with pytest.raises(SystemExit, match=f"serves models with full attention.*{obstacle}.*Remove --kv-retrieval"):
        start(parser, model(config))


@pytest.mark.parametrize("config", HYBRID.values(), ids=HYBRID)
def test_a_model_with_other_layers_than_attention_is_refused(config, model):
    with pytest.raises(UnsupportedConfiguration, match="has state-space or linear-attention layers"):
        check_model(ModelConfig(model(config)), FreeKVConfig())


@pytest.mark.parametrize("config", SERVED.values(), ids=SERVED)
def test_a_model_with_full_attention_is_served(config, parser, model):
    assert start(parser, model(config))._freekv == FreeKVConfig()


def test_the_last_layer_may_be_dense_and_the_next_number_is_refused(parser, model):
    assert start(parser, model(LLAMA), "--freekv-dense-layers 0,3")._freekv.dense_layers == (0, 3)
    with pytest.raises(SystemExit, match=r"--freekv-dense-layers .* the model has layers 0 to 3"):
        start(parser, model(LLAMA), "--freekv-dense-layers 4")


def test_a_chunk_that_ends_inside_a_page_is_refused(parser, model):
    with pytest.raises(SystemExit, match="--chunked-prefill-size is 100; give a multiple"):
        start(parser, model(LLAMA), "--chunked-prefill-size 100")
    with pytest.raises(SystemExit, match=r"--chunked-prefill-size is 96; give a multiple of the page size \(64"):
        start(parser, model(LLAMA), "--chunked-prefill-size 96 --page-size 64")
    assert start(parser, model(LLAMA), "--chunked-prefill-size 96").chunked_prefill_size == 96
    assert start(parser, model(LLAMA), "--chunked-prefill-size -1").chunked_prefill_size == -1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--freekv-budget 100", "--freekv-budget is 100; give"),
        ("--page-size 1", "--page-size is 1; give tokens, 16, 32 or 64"),
        ("--page-size 64 --freekv-budget 1056", r"--freekv-budget is 1056; give .* page size \(64\)"),
        (
            "--kv-retrieval none --freekv-budget 512",
            "--freekv-budget has no effect without --kv-retrieval freekv",
        ),
    ],
)
def test_a_flag_of_ours_that_does_not_fit_ends_start_up_with_a_sentence(flags, sentence, parser, model):
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        start(parser, model(LLAMA), flags)


def test_graphs_of_decode_may_be_sized_and_switched_off(parser, model):
    sized = start(parser, model(LLAMA), "--cuda-graph-max-bs-decode 16 --cuda-graph-backend-decode full")
    assert sized.cuda_graph_config.prefill.backend == "disabled"
    off = start(parser, model(LLAMA), "--disable-decode-cuda-graph")
    assert off.cuda_graph_config.decode.backend == "disabled"


def test_a_device_without_kernels_is_refused():
    resolved = argparse.Namespace(device="xpu", page_size=32, chunked_prefill_size=2048, cuda_graph_config=GRAPHS)
    with pytest.raises(UnsupportedConfiguration, match="runs on cpu and on cuda, not on xpu"):
        check_resolved(resolved, FreeKVConfig())


def on_gpu(model_path: str, dtype: str = "auto", **settings) -> argparse.Namespace:
    server_args = argparse.Namespace(**{**vars(ON_GPU), **settings})
    model = ModelConfig(model_path, dtype=dtype)
    server_args.get_model_config, server_args._model_config = lambda: model, model  # of either release
    return server_args


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "config",
    [
        WIDE,
        {**WIDE, "torch_dtype": "float16"},
        {**WIDE, "head_dim": 64},
        {**WIDE, "head_dim": 96},
        {**WIDE, "head_dim": 256},
        {**WIDE, "num_attention_heads": 32, "head_dim": 128},
    ],
)
def test_a_16_bit_model_with_usual_heads_is_served_on_a_gpu(config, model):
    check_resolved(on_gpu(model({**LLAMA, **config})), FreeKVConfig())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("config", "settings", "sentence"),
    [
        (WIDE, {"dtype": "float32"}, "needs a 16-bit model, not torch.float32: give --dtype bfloat16"),
        ({**WIDE, "head_dim": 288}, {}, "serves head dimensions up to 256, not 288"),
        ({**WIDE, "head_dim": 128, "num_attention_heads": 64}, {}, "up to 16 query heads per KV head, not 32"),
        (WIDE, {"kv_cache_dtype": "float16"}, "KV cache of the model's torch.bfloat16, not float16"),
    ],
)
def test_a_model_that_the_kernels_do_not_serve_is_refused_on_a_gpu(config, settings, sentence, model):
    with pytest.raises(UnsupportedConfiguration, match=f"freekv on a GPU .*{sentence}.*; or remove --kv-retrieval"):
        check_resolved(on_gpu(model({**LLAMA, **config}), **settings), FreeKVConfig())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_without_kernels_is_refused_on_a_gpu_by_its_source_and_served_on_a_cpu(name, parser, model):
    path, selector = model({**LLAMA, **WIDE}), SELECTORS[name]
    if selector.runs_on_gpu:
        check_resolved(on_gpu(path), FreeKVConfig(selector=name))
    else:
        source = re.escape(selector.baseline)
        with pytest.raises(
            UnsupportedConfiguration, match=f"^--freekv-selector is '{name}', .*{source}.*; .* give one of"
        ):
            check_resolved(on_gpu(path), FreeKVConfig(selector=name))
    assert start(parser, path, f"--freekv-selector {name}")._freekv.selector == name


@pytest.mark.usefixtures("hopper")
def test_ranks_share_the_query_heads_so_the_group_is_the_same_and_replicated_kv_heads_make_it_smaller(model):
    path = model({**LLAMA, **WIDE, "head_dim": 128, "num_attention_heads": 64})
    check_resolved(on_gpu(path, tp_size=4), FreeKVConfig())  # 16 query heads and one of two KV heads on each rank


def test_an_old_gpu_is_refused(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UnsupportedConfiguration, match=r"needs compute capability 8\.0, found 7\.5"):
        check_resolved(on_gpu(model({**LLAMA, **WIDE})), FreeKVConfig())


@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_flashinfer_or_by_another_maker_is_refused(model, monkeypatch):
    resolved = on_gpu(model({**LLAMA, **WIDE}))
    with monkeypatch.context() as missing:
        missing.setattr(support.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UnsupportedConfiguration, match="needs FlashInfer, which is not installed"):
            check_resolved(resolved, FreeKVConfig())
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UnsupportedConfiguration, match="needs one by NVIDIA"):
        check_resolved(resolved, FreeKVConfig())


def test_on_a_gpu_flashinfer_is_preset_and_prefill_runs_without_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = preset({"model_path": "m"})
    assert (found["attention_backend"], found["disable_prefill_cuda_graph"]) == ("flashinfer", True)
    assert preset({"model_path": "m", "device": "cpu"})["attention_backend"] == "torch_native"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        (
            {"decode": PhaseConfig("breakable")},
            "decode backend breakable of --cuda-graph-config: .*; use full or disabled",
        ),
        ({"prefill": PhaseConfig("full")}, "prefill backend full of --cuda-graph-config: .*; use disabled"),
    ],
)
def test_the_json_of_the_graphs_is_held_to_the_same_rules_as_the_flags(phases, sentence, model):
    graphs = CudaGraphConfig(**{"prefill": PhaseConfig("disabled"), **phases})
    with pytest.raises(UnsupportedConfiguration, match=sentence):
        check_resolved(on_gpu(model({**LLAMA, **WIDE}), cuda_graph_config=graphs), FreeKVConfig())


def test_what_the_user_left_open_is_preset(parser, model):
    server_args = start(parser, model(LLAMA))
    assert server_args.page_size == 32
    assert server_args.radix_cache_backend == "freekv"
    assert server_args.attention_backend == "torch_native"
    assert server_args.device == "cpu"
    assert server_args.disable_prefill_cuda_graph


def test_what_the_user_chose_is_kept(parser, model):
    server_args = start(parser, model(LLAMA), "--page-size 16 --attention-backend torch_native --random-seed 7")
    assert server_args.page_size == server_args._freekv.page_size == 16
    assert (server_args.attention_backend, server_args.random_seed) == ("torch_native", 7)


def test_a_page_size_that_sglang_changes_is_refused(model):
    with pytest.raises(UnsupportedConfiguration, match="--page-size is 16, and another flag makes it 64"):
        check_resolved(on_gpu(model(LLAMA), page_size=64), FreeKVConfig(page_size=16))


def test_presets_leave_the_callers_arguments_alone():
    raw = {"page_size": None, "model_path": "m"}
    assert preset(raw)["page_size"] == 32
    assert raw == {"page_size": None, "model_path": "m"}


def test_keywords_of_the_engine_reach_the_config(model):
    keywords = {"kv_retrieval": "freekv", "freekv_budget": 512, "freekv_tau": 1.01}
    server_args = release.settings_of(Engine.server_args_class(model_path=model(LLAMA), **keywords))
    assert server_args._freekv == FreeKVConfig(budget_tokens=512, tau=1.01)
    assert server_args.page_size == 32


def test_a_keyword_that_does_not_fit_raises_and_does_not_exit(model):
    with pytest.raises(UnsupportedConfiguration, match="--page-size is 8"):
        Engine.server_args_class(model_path=model(LLAMA), kv_retrieval="freekv", page_size=8)
    with pytest.raises(UnsupportedConfiguration, match="--freekv-tau has no effect"):
        Engine.server_args_class(model_path=model(LLAMA), freekv_tau=0.5)
