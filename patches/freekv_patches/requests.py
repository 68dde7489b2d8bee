"""Requests as they enter: in the processes that tokenize, and once more in the scheduler.

SGLang checks lengths where it tokenizes and turns a ValueError into HTTP 400, on every endpoint. A budget that does
not fit, a dump without a folder, or a token that the model does not have, is refused at the same place. The scheduler,
which would end of them later, looks again: not every process that sends it requests is SGLang's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr as shorten

from freekv_patches.fatal_requests import check_fields, check_readable
from freekv_patches.patch import HookType, Patch, freekv_config
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.releases import release
from sglang_freekv.request_params import (
    check_custom_params_fit,
    request_budget_tokens,
    request_dump_interval,
    request_mass,
)


def check_request(self, obj, input_ids):
    if (config := freekv_config(self.server_args)) is not None:
        sampling_params = obj.sampling_params or {}
        custom_params = sampling_params.get("custom_params")
        _check_beams(sampling_params.get("beam_width"))
        server_args = release.settings_of(self.server_args)
        check_fields(obj, server_args, self.model_config)
        _check(config, server_args, self.model_config, input_ids or (), custom_params)
        check_custom_params_fit(custom_params)


def check_tokenized_request(result, self, *args, **kwargs):
    if freekv_config(self.server_args) is not None:
        check_readable(result)


def check_queued_request(self, req, is_retracted=False):
    if (config := freekv_config(self.server_args)) is None or is_retracted:
        return
    sampling_params, tokens = req.sampling_params, req.origin_input_ids_unpadded
    try:
        _check_beams(getattr(sampling_params, "beam_width", None))
        _check(config, release.settings_of(self.server_args), self.model_config, tokens, sampling_params.custom_params)
    except ValueError as refusal:
        sampling_params.custom_params = req.input_embeds = None  # it runs for one step, and nothing of it is read
        req.set_finish_with_abort(str(refusal))


def _check(config: FreeKVConfig, server_args, model_config, tokens: Sequence, custom_params) -> None:
    """Raise ValueError, with a sentence for the client, where a request cannot be served."""
    if not server_args.enable_lora:  # an adapter may bring tokens of its own
        _check_tokens(tokens, model_config.vocab_size)
    request_budget_tokens(config, custom_params)
    request_mass(config, custom_params)
    request_dump_interval(config, custom_params)


def _check_beams(width) -> None:
    """Refuse beam search, which SGLang 0.5.23 has: the sequences of a beam take rows that no request comes to."""
    if isinstance(width, int) and width > 1:
        raise ValueError(
            f"beam_width is {width}; give 1, as KV retrieval keeps a window for each request, not each beam."
        )


def _check_tokens(tokens: Sequence, vocab_size: int) -> None:
    """Refuse a token beyond the vocabulary: SGLang 0.5.17 looks it up all the same, and its scheduler ends."""
    for token in tokens:
        if isinstance(token, int) and not 0 <= token < vocab_size:
            raise ValueError(
                f"input_ids contains {shorten(token)}; give tokens of the vocabulary, 0 to {vocab_size - 1}."
            )


PATCHES = (
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        kind=HookType.BEFORE,
        hook=check_request,
        signature="(self, obj: 'Union[GenerateReqInput, EmbeddingReqInput]', input_ids: 'List[int]') -> 'None'",
        reason="no registry checks a request's parameters, and nothing its tokens",
        remove_when="SGLang validates custom_params through a registered function, and tokens",
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        kind=HookType.AFTER,
        hook=check_tokenized_request,
        signature=(
            "(self, obj: 'Union[GenerateReqInput, EmbeddingReqInput]', input_text: 'str', "
            "input_ids: 'Optional[List[int]]', input_embeds: 'Optional[List[List[float]]]' = None, mm_inputs=None, "
            "token_type_ids: 'Optional[List[int]]' = None) -> 'Union[TokenizedGenerateReqInput, "
            "TokenizedEmbeddingReqInput]'"
        ),
        reason="a scheduler that cannot read a message ends the server",
        remove_when="SGLang answers a message that it cannot read with an error",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        kind=HookType.BEFORE,
        hook=check_queued_request,
        signature="(self, req: sglang.srt.managers.schedule_batch.Req, is_retracted: bool = False)",
        reason="a scheduler that raises ends the server, so a request that does not fit is finished with an error",
        remove_when="SGLang's scheduler answers a request that raises with an error",
    ),
)
