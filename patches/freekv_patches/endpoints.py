"""Endpoints by which any client ends SGLang 0.5.17's scheduler: with `--kv-retrieval` they answer with HTTP 400."""

from __future__ import annotations

from freekv_patches.patch import HookType, Patch, freekv_config

_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_RECORDER = ("start_expert_distribution_record", "stop_expert_distribution_record", "dump_expert_distribution_record")


def refuse_without_recorder(self):
    if freekv_config(self.server_args) is not None and self.server_args.expert_distribution_recorder_mode is None:
        from fastapi import HTTPException

        raise HTTPException(
            400, "This server records no expert distribution; start it with --expert-distribution-recorder-mode."
        )


PATCHES = tuple(
    Patch(
        target=f"{_TOKENIZER}.{name}",
        kind=HookType.BEFORE,
        hook=refuse_without_recorder,
        signature="(self: 'TokenizerManager')",
        reason="a scheduler without a recorder raises, which ends the server",
        remove_when="SGLang answers this with an error",
    )
    for name in _RECORDER
)
