"""SGLang 0.5.23: its arguments are what the user gave; what they resolve to stands beside them, and is sealed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from sglang.srt.arg_groups.model_override_base import ResolvingConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.server_args import ServerArgs

# Where SGLang asks for the size of a GPU to derive defaults from it.
GPU_CAPACITY = "sglang.srt.arg_groups.memory_hook.get_device_memory_capacity"

# Fields of an attention layer that concern the graphs of prefill alone, which are refused.
PREFILL_GRAPH_FIELDS = frozenset({"use_prefill_attention_wrapper"})

# Of a batch for the model: its tokens without padding, on the host.
BATCH_TOKENS = "global_num_token_non_padded_cpu"


def resolve(server_args: ServerArgs) -> None:
    """Resolve the arguments, which seals them; once is enough."""
    server_args.resolve_once()


def publish(server_args: ServerArgs) -> None:
    """Make resolved arguments those of this process, the only rank, before it runs a model by itself."""
    from sglang.srt import runtime_context

    ranks = runtime_context.SpawnRanks(world_rank=0, gpu_id=0)
    runtime_context.publish(server_args, role="scheduler", ranks=ranks)


def settings_of(server_args: ServerArgs) -> ResolvingConfig:
    """What holds the resolved settings as attributes."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    return resolving_view(server_args)


def defaults() -> dict[str, Any]:
    """Every setting's default, before anything is resolved."""
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.server_args import ServerArgs

    return {field.name: field.default for field in record_fields(ServerArgs)}


def model_of(server_args: ServerArgs | ResolvingConfig) -> ModelConfig:
    """The model that the arguments name."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def merge_config_file(parser: ArgumentParser, argv: list[str]) -> list[str]:
    """The command line with the flags of its ``--config`` file."""
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    return ConfigArgumentMerger(parser).merge_config_with_args(argv)


def row_of(req: Req) -> int | None:
    """A request's row of the request table."""
    return req.kv.req_pool_idx


def extra_context_len(server_args: ServerArgs | ResolvingConfig) -> int:
    """Tokens that a row of the request table holds beyond the model's context."""
    from sglang.srt.arg_groups.model_override_base import ResolvingConfig, record_of
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
    from sglang.srt.runtime_context import create_context, use_context

    given = record_of(server_args) if isinstance(server_args, ResolvingConfig) else server_args
    with use_context(create_context(given, role="scheduler")):  # the doctor's are not those of this process
        return get_req_to_token_extra_context_len()
