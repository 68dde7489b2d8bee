"""Requests as they enter, in the process that tokenizes.

SGLang checks lengths here and turns a ValueError into HTTP 400, on every endpoint. A budget that does
not fit is refused at the same place; later, in the scheduler, nobody waits for a reason.
"""

from __future__ import annotations

from freekv_patches.patch import HookType, Patch, freekv_config


def check_budget(self, obj, input_ids):
    if (config := freekv_config(self.server_args)) is not None:
        config.request_budget_tokens((obj.sampling_params or {}).get("custom_params"))


PATCHES = (
    Patch(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        kind=HookType.BEFORE,
        hook=check_budget,
        signature="(self, obj: 'Union[GenerateReqInput, EmbeddingReqInput]', input_ids: 'List[int]') -> 'None'",
        reason="no registry checks a request's parameters",
        remove_when="SGLang validates custom_params through a registered function",
    ),
)
