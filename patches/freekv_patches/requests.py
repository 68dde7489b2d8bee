"""Requests as they enter, in the process that tokenizes.

SGLang checks lengths here and turns a ValueError into HTTP 400, on every endpoint. A budget that does
not fit, or a dump without a folder, is refused at the same place; later, in the scheduler, nobody waits for a reason.
"""

from __future__ import annotations

from freekv_patches.patch import HookType, Patch, freekv_config
from sglang_freekv.config import check_custom_params_fit


def check_custom_params(self, obj, input_ids):
    if (config := freekv_config(self.server_args)) is not None:
        custom_params = (obj.sampling_params or {}).get("custom_params")
        config.request_budget_tokens(custom_params)
        config.request_dump_interval(custom_params)
        check_custom_params_fit(custom_params)


PATCHES = (
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        kind=HookType.BEFORE,
        hook=check_custom_params,
        signature="(self, obj: 'Union[GenerateReqInput, EmbeddingReqInput]', input_ids: 'List[int]') -> 'None'",
        reason="no registry checks a request's parameters",
        remove_when="SGLang validates custom_params through a registered function",
    ),
)
