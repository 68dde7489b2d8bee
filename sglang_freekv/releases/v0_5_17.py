"""SGLang 0.5.17: its arguments are a dataclass that resolves itself, in place, when it is made."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.server_args import ServerArgs

# Where SGLang asks for the size of a GPU to derive defaults from it.
GPU_CAPACITY = "sglang.srt.server_args.get_device_memory_capacity"

# Fields of an attention layer that concern the graphs of prefill alone, which are refused.
PREFILL_GRAPH_FIELDS: frozenset[str] = frozenset()

# Of a batch for the model: its tokens without padding, on the host.
BATCH_TOKENS = "num_token_non_padded_cpu"


def resolve(server_args: ServerArgs) -> None:
    """Nothing to do: the arguments are resolved."""


def publish(server_args: ServerArgs) -> None:
    """Nothing to do before this process runs a model by itself: what makes its parts hands them the arguments."""


def settings_of(server_args: ServerArgs) -> ServerArgs:
    """What holds the resolved settings as attributes."""
    return server_args


def defaults() -> dict[str, Any]:
    """Every setting's default, before anything is resolved."""
    from sglang.srt.server_args import ServerArgs

    return {field.name: field.default for field in dataclasses.fields(ServerArgs)}


def model_of(server_args: ServerArgs) -> ModelConfig:
    """The model that the arguments name."""
    return server_args.get_model_config()


def merge_config_file(parser: ArgumentParser, argv: list[str]) -> list[str]:
    """The command line with the flags of its ``--config`` file."""
    from sglang.srt.server_args_config_parser import ConfigArgumentMerger

    return ConfigArgumentMerger(parser).merge_config_with_args(argv)


def row_of(req: Req) -> int | None:
    """A request's row of the request table."""
    return req.req_pool_idx


def extra_context_len(server_args: ServerArgs) -> int:
    """Tokens that a row of the request table holds beyond the model's context."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    return get_req_to_token_extra_context_len(server_args)
