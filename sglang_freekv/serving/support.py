"""Which SGLang settings and machines FreeKV serves: what it presets, and what it refuses with a sentence."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_freekv.algorithm.selectors import SELECTORS
from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.memory.geometry import GPU_GROUP_SIZE, GPU_HEAD_DIMS
from sglang_freekv.memory.units import in_words
from sglang_freekv.releases import release
from sglang_freekv.serving.backend_names import OTHER_NAME, fields_of, needs_other_name
from sglang_freekv.serving.model_support import check_model

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
    from sglang.srt.server_args import ServerArgs

_GPU_CAPABILITY = (8, 0)
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_BYTES = 1 << 20  # SGLang 0.5.17: 16 KiB for each scheduler, and a page for each semaphore


class Rule(NamedTuple):
    """Values that one field of `ServerArgs` may have."""

    field: str
    allowed: tuple[Any, ...]
    why: str
    fix: str = ""  # what to change; empty: leave the flag out

    def refusal(self, settings: Mapping[str, Any]) -> str | None:
        """Say why the value is refused; None where it is not, or where it is not set."""
        value = settings.get(self.field, self.allowed[0])
        if value in self.allowed:
            return None
        flag = f"--{self.field.replace('_', '-')}"
        given = flag if value is True else f"{flag} {value}"
        fix = self.fix or f"remove {flag}"
        return f"--kv-retrieval freekv does not work with {given}: {self.why}; {fix}."


_TAKES_KV = "it stores the KV cache elsewhere, which FreeKV does itself"
_SPLITS_KV = "FreeKV keeps the whole KV of a head on one rank"
_OWN_STEPS = "it runs batches in an order that FreeKV's windows do not follow"
_OWN_LAYOUT = "FreeKV has its own layout of the KV cache"
_OWN_GRAPHS = "a decode step is captured as a whole, or runs without a graph"

_KV_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The first allowed value is SGLang's default. A rule whose setting a release does not have is not asked there.
RULES = (
    Rule("attention_backend", (None, "flashinfer", "torch_native"), "FreeKV brings its own attention"),
    Rule("prefill_attention_backend", (None,), "FreeKV brings its own attention"),
    Rule("decode_attention_backend", (None,), "FreeKV brings its own attention"),
    Rule(
        "kv_cache_dtype",
        ("auto", *_KV_DTYPES),
        "the KV cache is not quantized",
        "use --kv-cache-dtype auto",
    ),
    Rule("radix_cache_backend", (None, "freekv"), "FreeKV brings its own"),
    Rule("enable_hierarchical_cache", (False,), _TAKES_KV),
    Rule("enable_lmcache", (False,), _TAKES_KV),
    Rule("enable_flexkv", (False,), _TAKES_KV),
    Rule("enable_hisparse", (False,), _TAKES_KV),
    Rule("prefill_only_disable_kv_cache", (False,), _TAKES_KV),
    Rule("enable_unified_cache_external_linker", (False,), _TAKES_KV),
    Rule("enable_unified_memory", (False,), _OWN_LAYOUT),
    Rule("enable_page_major_kv_layout", (False,), _OWN_LAYOUT),
    Rule("enable_memory_saver", (False,), "CPU memory that holds the KV cannot be released and taken again"),
    Rule("kv_canary", ("none",), "the canary writes into SGLang's KV pool"),
    Rule("enable_session_radix_cache", (False,), "FreeKV has its own radix cache"),
    Rule("speculative_algorithm", (None,), "draft tokens would enter pages before they are accepted"),
    Rule("disaggregation_mode", ("null",), "prefill and decode share one host store"),
    Rule("enable_mixed_chunk", (False,), "a batch is either prefill or decode"),
    Rule("enable_mis", (False,), "an item would attend to the items before it"),
    Rule("enable_torch_compile", (False,), "attention plans its steps outside the compiled model"),
    Rule("cuda_graph_backend_decode", (None, "full", "disabled"), _OWN_GRAPHS),
    Rule("cuda_graph_backend_prefill", (None, "disabled"), "prefill reads prefixes of any length from the host store"),
    Rule("debug_cuda_graph", (False,), _OWN_GRAPHS),
    Rule("enable_nvidia_megakernel", (False,), "FreeKV brings its own attention"),
    Rule("enable_two_batch_overlap", (False,), _OWN_STEPS),
    Rule("enable_single_batch_overlap", (False,), _OWN_STEPS),
    Rule("enable_pdmux", (False,), _OWN_STEPS),
    Rule("dllm_algorithm", (None,), "a diffusion model does not decode one token after the other"),
    Rule("pp_size", (1,), "every layer's KV must be on one rank", "use --tp-size"),
    Rule("dcp_size", (1,), _SPLITS_KV),
    Rule("attn_cp_size", (1,), _SPLITS_KV),
    Rule("enable_prefill_cp", (False,), _SPLITS_KV),
    Rule("enable_prefill_context_parallel", (False,), _SPLITS_KV),
    Rule("enable_dp_attention", (False,), _SPLITS_KV),
    Rule("attn_dp_size", (1,), _SPLITS_KV),
    Rule("enable_kv_cache_sharding", (False,), _SPLITS_KV),
    Rule("use_ray", (False,), "Ray's actors do not inherit the environment that activates FreeKV"),
    Rule("smg_grpc_mode", (False,), "another package starts its schedulers, and FreeKV would not be active in them"),
    Rule("enable_deterministic_inference", (False,), "results may differ in the last bits between batches"),
    Rule("rl_on_policy_target", (None,), "results may differ in the last bits between batches"),
)


def preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Set what FreeKV needs where the user left SGLang's default, in arguments not yet resolved.

    Raises
    ------
    UnsupportedConfiguration
        If the user chose a value that FreeKV does not work with.
    """
    on_cpu = not torch.cuda.is_available() or str(raw.get("device")).startswith("cpu")
    presets = {
        "page_size": FreeKVConfig.page_size,
        "attention_backend": "torch_native" if on_cpu else "flashinfer",
        "radix_cache_backend": "freekv",
        "disable_hybrid_swa_memory": True,  # the host store has the tokens of every layer, also where a window slides
        "disable_prefill_cuda_graph": True,  # prefill reads prefixes of any length from the host store
    }
    # Whether a model needs that name is known for sure when SGLang has read it: see `check_settings`.
    _apply_rules({**raw, "attention_backend": None} if raw.get("attention_backend") == OTHER_NAME else raw)
    defaults = release.defaults()
    left = {name: value for name, value in presets.items() if raw.get(name, defaults[name]) == defaults[name]}
    if needs_other_name(fields_of(raw.get("model_path") or "")):
        if on_cpu and raw.get("device") != "cuda":  # the doctor asks for a GPU that is elsewhere
            raise UnsupportedConfiguration(
                f"SGLang serves {raw['model_path']} with attention that needs a GPU; give another model, or a GPU."
            )
        if raw.get("attention_backend") not in (defaults["attention_backend"], OTHER_NAME):
            raise UnsupportedConfiguration(
                f"SGLang does not serve {raw['model_path']} with --attention-backend {raw['attention_backend']}; "
                f"leave it out."
            )
        left["attention_backend"] = OTHER_NAME
    return {**raw, **left}


def check_resolved(server_args: ServerArgs, config: FreeKVConfig) -> None:
    """Raise UnsupportedConfiguration where the resolved settings, the model, or this machine, are not served."""
    check_settings(server_args, config)
    check_shared_memory()
    if server_args.device == "cuda":
        check_gpu(server_args, release.model_of(server_args))
    _make_folder(config.debug_dump)


def check_settings(server_args: ServerArgs, config: FreeKVConfig) -> None:
    """The part of `check_resolved` that does not ask the machine."""
    settings = {rule.field: getattr(server_args, rule.field) for rule in RULES if hasattr(server_args, rule.field)}
    is_other = settings.get("attention_backend") == OTHER_NAME
    if is_other and needs_other_name(release.model_of(server_args).hf_config.to_dict()):
        settings["attention_backend"] = None  # preset
    _apply_rules(settings)
    if server_args.page_size != config.page_size:
        raise UnsupportedConfiguration(
            f"--page-size is {config.page_size}, and another flag makes it {server_args.page_size}; leave that out."
        )
    if server_args.chunked_prefill_size > 0 and server_args.chunked_prefill_size % config.page_size:
        raise UnsupportedConfiguration(
            f"--chunked-prefill-size is {server_args.chunked_prefill_size}; give a multiple of the page size "
            f"({config.page_size} tokens)."
        )
    _check_graphs(server_args.cuda_graph_config)
    if server_args.device not in ("cpu", "cuda"):
        raise UnsupportedConfiguration(
            f"--kv-retrieval freekv runs on cpu and on cuda, not on {server_args.device}; remove it, or give --device."
        )
    if server_args.device == "cuda":
        _check_selector(config.selector_name)
    check_model(release.model_of(server_args), config)


def _check_selector(name: str) -> None:
    """Refuse on a GPU what has no kernels."""
    selector = SELECTORS[name]
    if not selector.runs_on_gpu:
        possible = [other for other, one in SELECTORS.items() if one.runs_on_gpu]
        raise UnsupportedConfiguration(
            f"--freekv-selector is {name!r}, a baseline ({selector.baseline}) without kernels, which runs on a CPU "
            f"only; on a GPU give one of {', '.join(possible)}, or add --device cpu."
        )


def _make_folder(path: str | None) -> None:
    """Make the folder for debug dumps, where one is wanted."""
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UnsupportedConfiguration(
            f"--freekv-debug-dump is {path!r}, where no file can be written ({error.strerror}); give another folder."
        ) from error


def _check_graphs(config: CudaGraphConfig) -> None:
    """Refuse in --cuda-graph-config what the flags of the two phases refuse."""
    for phase in ("decode", "prefill"):
        rule = next(rule for rule in RULES if rule.field == f"cuda_graph_backend_{phase}")
        if config[phase].backend not in rule.allowed:
            allowed = " or ".join(backend for backend in rule.allowed if backend is not None)
            raise UnsupportedConfiguration(
                f"--kv-retrieval freekv does not work with the {phase} backend {config[phase].backend} of "
                f"--cuda-graph-config: {rule.why}; use {allowed}."
            )


def check_shared_memory(folder: Path = _SHARED_MEMORY) -> None:
    """Raise UnsupportedConfiguration where SGLang's scheduler would be ended by SIGBUS, without a word."""
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < _SHARED_BYTES:
        raise UnsupportedConfiguration(
            f"{folder} has {in_words(free)} free, and SGLang's processes share up to {in_words(_SHARED_BYTES)} there; "
            f"remove files that are no longer used, or give a container more of it (docker run --shm-size 1g)."
        )


def check_gpu(server_args: ServerArgs, model: ModelConfig) -> None:
    """Raise UnsupportedConfiguration where the GPU, or the kernels, do not serve the model."""
    _refuse_on_gpu(_machine_obstacle())
    check_kernels(server_args, model)


def check_kernels(server_args: ServerArgs, model: ModelConfig) -> None:
    """The part of `check_gpu` that does not ask the machine."""
    _check_ranks(model, server_args.tp_size)
    _refuse_on_gpu(_kernel_obstacle(server_args, model))


def _refuse_on_gpu(obstacle: str | None) -> None:
    if obstacle is not None:
        raise UnsupportedConfiguration(f"--kv-retrieval freekv on a GPU {obstacle}; or remove --kv-retrieval.")


def _check_ranks(model: ModelConfig, tp_size: int) -> None:
    """Refuse what SGLang's layers would assert while the model is loaded. On a CPU it pads the heads instead."""
    q_heads, kv_heads = model.num_attention_heads, model.get_total_num_kv_heads()
    if q_heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        possible = [n for n in range(1, q_heads + 1) if not q_heads % n and (not kv_heads % n or not n % kv_heads)]
        raise UnsupportedConfiguration(
            f"--tp-size is {tp_size}, and ranks cannot share {q_heads} query heads and {kv_heads} KV heads evenly; "
            f"give one of {', '.join(map(str, possible))}."
        )


def _machine_obstacle() -> str | None:
    """Say what is needed and what was found; None where nothing is in the way."""
    if torch.version.cuda is None:
        return "needs one by NVIDIA, and this torch is built for another: use a CUDA build of torch"
    if importlib.util.find_spec("flashinfer") is None:
        return "needs FlashInfer, which is not installed: install flashinfer-python"
    if (found := torch.cuda.get_device_capability()) < _GPU_CAPABILITY:
        return f"needs compute capability {_in_words(_GPU_CAPABILITY)}, found {_in_words(found)}: use a newer GPU"
    return None


def _kernel_obstacle(server_args: ServerArgs, model: ModelConfig) -> str | None:
    """Say what of the model the kernels do not serve."""
    if model.dtype not in (torch.float16, torch.bfloat16):
        return f"needs a 16-bit model, not {model.dtype}: give --dtype bfloat16"
    if kv_dtype_of(server_args, model) != model.dtype:
        return f"needs a KV cache of the model's {model.dtype}, not {server_args.kv_cache_dtype}: give --dtype the same"
    if model.head_dim > max(GPU_HEAD_DIMS):
        return f"serves head dimensions up to {max(GPU_HEAD_DIMS)}, not {model.head_dim}: use another model"
    group_size = model.num_attention_heads // server_args.tp_size // model.get_num_kv_heads(server_args.tp_size)
    if group_size > GPU_GROUP_SIZE:
        return f"serves up to {GPU_GROUP_SIZE} query heads per KV head, not {group_size}: use another model"
    return None


def kv_dtype_of(server_args: ServerArgs, model: ModelConfig) -> torch.dtype:
    """What the KV cache is stored in; `check_settings` refuses other names."""
    return _KV_DTYPES.get(server_args.kv_cache_dtype, model.dtype)


def _in_words(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _apply_rules(settings: Mapping[str, Any]) -> None:
    for rule in RULES:
        if (refusal := rule.refusal(settings)) is not None:
            raise UnsupportedConfiguration(refusal)
