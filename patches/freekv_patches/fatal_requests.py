"""Requests by which any client ends SGLang 0.5.17, whatever its flags: with `--kv-retrieval` they get HTTP 400.

The scheduler reads messages by their types and ends where it cannot; it indexes tensors with some numbers as they
come; and what concerns a part of it that is switched off may raise. On a plain server these requests are as fatal as
they always were; `operations/README.md` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from reprlib import repr as shorten
from typing import Any, NamedTuple

import msgspec

_LARGEST_INT32 = (1 << 31) - 1
_PICKLED = ("mm_inputs", "mm_data_mooncake", "time_stats")  # SGLang sends these as bytes


class Limit(NamedTuple):
    """What a field of a request, or of its sampling parameters, may be."""

    field: str
    is_fatal: Callable[[Any, Any, Any], bool]  # of the value, the server's arguments and the model's configuration
    expected: str


def _is_no_tensor(value: Any, server_args: Any, model: Any) -> bool:
    from sglang.srt.managers.embed_types import PositionalEmbeds

    return not isinstance(value, PositionalEmbeds)


def _is_of_another_width(value: Any, server_args: Any, model: Any) -> bool:
    return any(len(embedding) != model.hidden_size for embedding in value)


def _are_unknown_labels(value: Any, server_args: Any, model: Any) -> bool:
    allowed = server_args.tokenizer_metrics_allowed_custom_labels or ()
    return server_args.enable_metrics and not set(value) <= set(allowed)


FIELDS = (
    Limit("bootstrap_host", lambda value, *_: True, "nothing, as prefill is not disaggregated here"),
    Limit("positional_embed_overrides", _is_no_tensor, "nothing, as JSON holds no tensors"),
    Limit("input_embeds", _is_of_another_width, "a list of the model's hidden size for each token"),
    Limit("logprob_start_len", lambda value, *_: value < -1, "-1, or a position from 0"),
    Limit("top_logprobs_num", lambda value, _, model: value > model.vocab_size, "at most the size of the vocabulary"),
    Limit("custom_labels", _are_unknown_labels, "labels of --tokenizer-metrics-allowed-custom-labels"),
)
SAMPLING_PARAMS = (Limit("top_k", lambda value, *_: value > _LARGEST_INT32, f"at most {_LARGEST_INT32}"),)


def check_fields(obj: Any, server_args: Any, model: Any) -> None:
    """Raise ValueError where a request that SGLang has validated would still end its scheduler.

    Parameters
    ----------
    obj : GenerateReqInput or EmbeddingReqInput
    server_args : ServerArgs
    model : ModelConfig
    """
    sampling_params = obj.sampling_params or {}
    values = [(limit, getattr(obj, limit.field, None)) for limit in FIELDS]
    values += [(limit, sampling_params.get(limit.field)) for limit in SAMPLING_PARAMS]
    for limit, value in values:
        if value is not None and limit.is_fatal(value, server_args, model):
            raise ValueError(f"{limit.field} is {shorten(value)}; give {limit.expected}.")


def check_readable(message: msgspec.Struct) -> None:
    """Raise ValueError where the scheduler could not read a tokenized request: it is written and read as on its way."""
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    pickled = {name: None for name in _PICKLED if hasattr(message, name)}
    try:
        msgpack_decode(msgpack_encode(msgspec.structs.replace(message, **pickled)))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        field, what = _field_of(message, str(error)), str(error).partition(" - at ")[0]
        raise ValueError(f"{field} is of a type that SGLang's scheduler cannot read: {what}.") from None


def _field_of(message: msgspec.Struct, error: str) -> str:
    """Name of the field that an error is about: messages are arrays, and errors tell positions."""
    found = re.search(r"at `\$\[(\d+)\](?:\[(\d+)\])?", error)
    if found is None:
        return "A field of the request"
    name = message.__struct_fields__[int(found[1]) - 1]  # the first element is the type of the message
    part = getattr(message, name)
    is_nested = found[2] is not None and isinstance(part, msgspec.Struct)
    return f"{name}.{part.__struct_fields__[int(found[2])]}" if is_nested else name
