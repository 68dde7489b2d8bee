"""Requests as they enter, in the process that tokenizes.

SGLang checks lengths here and turns a ValueError into HTTP 400, on every endpoint. A budget that does
not fit, a dump without a folder, or a token that the model does not have, is refused at the same place; later, in the
scheduler, nobody waits for a reason.
"""

from __future__ import annotations

from reprlib import repr as shorten

from freekv_patches.patch import HookType, Patch, freekv_config
from sglang_freekv.request_params import check_custom_params_fit, request_budget_tokens, request_dump_interval


def check_request(self, obj, input_ids):
    if (config := freekv_config(self.server_args)) is not None:
        if not self.server_args.enable_lora:  # an adapter may bring tokens of its own
            _check_tokens(input_ids, self.model_config.vocab_size)
        custom_params = (obj.sampling_params or {}).get("custom_params")
        request_budget_tokens(config, custom_params)
        request_dump_interval(config, custom_params)
        check_custom_params_fit(custom_params)


def _check_tokens(input_ids, vocab_size: int) -> None:
    """Refuse a token beyond the vocabulary: SGLang 0.5.17 looks it up all the same, and its scheduler ends."""
    for token in input_ids or ():
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
)
