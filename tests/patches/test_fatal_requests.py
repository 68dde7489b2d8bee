"""What would end SGLang's scheduler is refused where it is tokenized, by the name of the field; the rest passes."""

from __future__ import annotations

import types
from array import array

import pytest
import torch
from fastapi import HTTPException
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput, SessionParams, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from freekv_patches import endpoints, requests
from freekv_patches.fatal_requests import FIELDS, SAMPLING_PARAMS, check_fields, check_readable
from sglang_freekv.config import FreeKVConfig

MODEL = types.SimpleNamespace(vocab_size=256, hidden_size=4)
SERVER = types.SimpleNamespace(tokenizer_metrics_allowed_custom_labels=["team"], enable_metrics=True)
FATAL = {
    "bootstrap_host": ["2.2.2.2", "another"],
    "positional_embed_overrides": [{"embeds": [[1.0]], "positions": [0]}, "x", 5, []],
    "input_embeds": [[[0.5, 0.5]], [[0.5] * 4, [0.5] * 3], [[]]],
    "logprob_start_len": [-2, -600],
    "top_logprobs_num": [257, 1_000_000],
    "custom_labels": [{"a": "b"}, {"team": "a", "b": "c"}],
}
FINE = {
    "positional_embed_overrides": [PositionalEmbeds(torch.zeros(1, 4), [0])],
    "input_embeds": [[[0.5] * 4] * 3],
    "logprob_start_len": [-1, 0, 600],
    "top_logprobs_num": [0, 20, 256],
    "custom_labels": [{"team": "a"}, {}],
    "bootstrap_room": [5],
    "routed_dp_rank": [0],
}
FATAL_SAMPLING = {"top_k": [1 << 31, 1 << 40]}
FINE_SAMPLING = {"top_k": [-1, 1, (1 << 31) - 1], "custom_params": [{"a": 1}]}


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(name, value, id=f"{name}={str(value)[:20]}") for name, values in table.items() for value in values
    ]


def request(sampling_params: dict | None = None, **fields: object) -> GenerateReqInput:
    return GenerateReqInput(input_ids=[1, 2], sampling_params=sampling_params, **fields)


def test_every_limit_has_a_case_here():
    assert {limit.field for limit in FIELDS} == set(FATAL)
    assert {limit.field for limit in SAMPLING_PARAMS} == set(FATAL_SAMPLING)


@pytest.mark.parametrize(("field", "value"), cases(FATAL))
def test_a_field_that_would_end_the_scheduler_is_refused_by_name(field: str, value: object):
    with pytest.raises(ValueError, match=f"^{field} is .*; give .*"):
        check_fields(request(**{field: value}), SERVER, MODEL)


@pytest.mark.parametrize(("field", "value"), cases(FATAL_SAMPLING))
def test_a_sampling_parameter_that_would_end_the_scheduler_is_refused_by_name(field: str, value: object):
    with pytest.raises(ValueError, match=f"^{field} is .*; give .*"):
        check_fields(request({field: value}), SERVER, MODEL)


@pytest.mark.parametrize(("field", "value"), cases(FINE))
def test_other_values_of_these_fields_pass(field: str, value: object):
    check_fields(request(**{field: value}), SERVER, MODEL)


@pytest.mark.parametrize(("field", "value"), cases(FINE_SAMPLING))
def test_other_sampling_parameters_pass(field: str, value: object):
    check_fields(request({field: value}), SERVER, MODEL)


def test_without_metrics_labels_go_nowhere_and_pass():
    server = types.SimpleNamespace(tokenizer_metrics_allowed_custom_labels=None, enable_metrics=False)
    check_fields(request(custom_labels={"a": "b"}), server, MODEL)


def test_a_request_for_an_embedding_has_fewer_fields_and_passes():
    check_fields(EmbeddingReqInput(text="hi"), SERVER, MODEL)


def tokenized(sampling_params: dict | None = None, **fields: object) -> TokenizedGenerateReqInput:
    """As SGLang's tokenizer makes it: some fields hold objects that are pickled later."""
    plain = {"input_text": "hi", "input_embeds": None, "token_type_ids": None, "token_ids_logprob": None}
    plain |= {"return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "stream": False, "rid": "a"}
    plain |= {"input_ids": array("q", range(9)), "mm_inputs": object(), "time_stats": object()}
    return TokenizedGenerateReqInput(sampling_params=SamplingParams(**(sampling_params or {})), **(plain | fields))


def test_what_the_scheduler_can_read_passes_and_is_left_as_it_is():
    message = tokenized({"logit_bias": {"5": 1.5}, "custom_params": {"a": [1]}}, extra_key="salt", priority=3)
    parts = message.mm_inputs, message.time_stats, message.sampling_params
    check_readable(message)
    assert (message.mm_inputs, message.time_stats, message.sampling_params) == parts


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("extra_key", tokenized(extra_key=["a", "b"])),
        ("priority", tokenized(priority="high")),
        ("rid", tokenized(rid=5)),
        ("session_params.id", tokenized(session_params=SessionParams(id=["a"]))),
        ("sampling_params.logit_bias", tokenized({"logit_bias": {"5": None}})),
        ("sampling_params.json_schema", tokenized({"json_schema": {"type": "object"}})),
        ("sampling_params.max_new_tokens", tokenized({"max_new_tokens": 1.5})),
        ("sampling_params.custom_params", tokenized({"custom_params": {"a": [[1]]}})),
        ("A field of the request", tokenized({"top_k": 1 << 70})),
        ("A field of the request", tokenized(rid="\ud800")),
    ],
)
def test_what_the_scheduler_cannot_read_is_refused_by_the_name_of_the_field(field: str, message):
    with pytest.raises(ValueError, match=f"^{field} is of a type that SGLang's scheduler cannot read: "):
        check_readable(message)


@pytest.mark.parametrize("is_freekv", [True, False])
def test_a_plain_server_is_left_as_it_is(is_freekv: bool):
    mode = {"expert_distribution_recorder_mode": None} | ({"_freekv": FreeKVConfig()} if is_freekv else {})
    manager = types.SimpleNamespace(server_args=types.SimpleNamespace(**mode))
    refusals = {
        ValueError: lambda: requests.check_tokenized_request(tokenized(rid=5), manager),
        HTTPException: lambda: endpoints.refuse_without_recorder(manager),
        (ValueError,): lambda: endpoints.refuse_to_release_memory(manager, "request"),
    }
    for error, refuse in refusals.items():
        if is_freekv:
            with pytest.raises(error):
                refuse()
        else:
            assert refuse() is None


def test_a_server_with_a_recorder_records():
    server_args = types.SimpleNamespace(_freekv=FreeKVConfig(), expert_distribution_recorder_mode="stat")
    assert endpoints.refuse_without_recorder(types.SimpleNamespace(server_args=server_args)) is None


def no_such_group(self, recv_req):
    raise AssertionError("Group g not in [].")


def weight_updater(server_args: types.SimpleNamespace) -> types.SimpleNamespace:
    runner = types.SimpleNamespace(server_args=server_args)
    return types.SimpleNamespace(tp_worker=types.SimpleNamespace(model_runner=runner))


@pytest.mark.parametrize("name", endpoints.UPDATES)
def test_a_change_of_weights_that_raises_is_answered_as_one_that_failed(name: str):
    (hook,) = (patch.hook for patch in endpoints.PATCHES if patch.target.endswith(f".{name}"))
    answer = hook(no_such_group, weight_updater(types.SimpleNamespace(_freekv=FreeKVConfig())), "request")
    assert type(answer).__name__ == f"{endpoints.UPDATES[name]}ReqOutput"
    assert (answer.success, answer.message) == (False, "Group g not in []. The weights may be changed in part.")
    assert hook(lambda self, recv_req: recv_req, None, "request") == "request"
    with pytest.raises(AssertionError):
        hook(no_such_group, weight_updater(types.SimpleNamespace()), "request")
