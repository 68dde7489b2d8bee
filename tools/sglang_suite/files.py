"""Which of SGLang's test files are run, below ``test/registered`` of its sources, and which of them are left out."""

from __future__ import annotations

# Every test_*.py in these folders and below them, and single files.
SUITES: dict[str, tuple[str, ...]] = {
    "Radix cache, allocators, pools": (
        "unit/mem_cache",
        "mem_cache",
        "radix_cache",
        "unit/layers/test_radix_attention.py",
    ),
    "Scheduling": ("unit/managers",),
    "OpenAI API": (
        "unit/entrypoints",
        "unit/function_call",
        "function_call",
        "openai_server",
        "core/test_basic_sanity.py",
    ),
}

_MAMBA = "pools of Mamba states, which are on a GPU"
_SPECULATIVE = "speculative decoding, with the checkpoints of two models"
_KNOWS = "asks a trained model what it knows"
_TOOLS = "asks a trained model to call tools"

_HIDDEN_STATES = "openai_server/features/test_openai_server_hidden_states.py"
_UNIFIED = "unit/mem_cache/test_unified_radix_cache"
_STOP = "openai_server/validation/test_matched_stop.py::TestMatchedStop::test_finish_stop"
_SANITY = "core/test_basic_sanity.py::TestBasicSanity"
_QUESTIONS = (
    "test_accuracy_floor",
    "test_basic_math",
    "test_capital_france",
    "test_color_completion",
    "test_concurrent_requests",
)

# File, or file and how its tests begin -> what it needs that a CPU and a tiny model have not.
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys((f"{_SANITY}::{test}" for test in _QUESTIONS), _KNOWS),
    f"{_SANITY}::test_fwd_occupancy": "measures how busy a GPU is",
    "mem_cache/test_post_capture_kv_sizing.py": "sizes the KV pool after CUDA graphs are captured",
    "radix_cache/test_cpp_radix_cache.py": "asks a trained model questions of MMLU",
    "radix_cache/test_int8_mamba_checkpoint_e2e.py": "Qwen3-Next-80B-A3B",
    "radix_cache/test_mamba2_extra_buffer_kl.py": "Nemotron-Nano-9B",
    "radix_cache/test_swa_radix_cache_kl.py": "gpt-oss-20b",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_hicache_pp_kl.py": "Qwen3-32B on several GPUs",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_cp.py": "Qwen3-32B on several GPUs",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_dcp.py": "Kimi-Linear-48B-A3B on several GPUs",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_dsv4.py": "DeepSeek-V4-Flash",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_dsv4_pp.py": "DeepSeek-V4-Flash",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_full.py": "Qwen3-32B",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_mamba.py": "Qwen3-Next-80B-A3B",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_mimo.py": "MiMo-V2.5",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_nightly.py": "GLM-5.2",
    "radix_cache/unified_radix_tree/test_unified_radix_cache_kl_swa.py": "gpt-oss-20b",
    f"{_UNIFIED}_unittest.py::Test_FULL_MAMBA": _MAMBA,
    f"{_UNIFIED}_unittest.py::Test_FULL_SWA_MAMBA": _MAMBA,
    f"{_UNIFIED}_bench.py::TestBench_FULL_MAMBA": _MAMBA,
    "openai_server/basic/test_serving_transcription.py": "a Whisper model",
    _STOP: "asks a trained model to stop",
    "openai_server/basic/test_openai_server.py::TestOpenAIV1Rerank": "a cross-encoder",
    "openai_server/features/test_json_mode.py": "asks a trained model to end an object",
    "openai_server/features/test_openai_server_ebnf.py": "xgrammar masks on a GPU only",
    f"{_HIDDEN_STATES}::TestOpenAIServerWithEAGLEAndHiddenStatesEnabled": _SPECULATIVE,
    f"{_HIDDEN_STATES}::TestOpenAIServerWithEAGLE3AndHiddenStatesEnabled": _SPECULATIVE,
    "openai_server/function_call/test_anthropic_tool_use.py": _TOOLS,
    "openai_server/function_call/test_openai_function_calling.py": _TOOLS,
}
