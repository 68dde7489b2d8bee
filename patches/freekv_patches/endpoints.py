"""Endpoints by which any client ends SGLang 0.5.17's scheduler: with `--kv-retrieval` they answer with HTTP 400.

What can be told before is refused where the endpoint is; a change of weights that raises is answered as SGLang answers
those that it finds wrong itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from freekv_patches.patch import HookType, Patch, freekv_config
from sglang_freekv.releases import release

logger = logging.getLogger(__name__)

_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_RECORDER = ("start_expert_distribution_record", "stop_expert_distribution_record", "dump_expert_distribution_record")
_MEMORY = {"release_memory_occupation": "Release", "resume_memory_occupation": "Resume"}
UPDATES = {
    "update_weights_from_disk": "UpdateWeightFromDisk",
    "update_weights_from_tensor": "UpdateWeightsFromTensor",
    "update_weights_from_distributed": "UpdateWeightsFromDistributed",
    "update_weights_from_ipc": "UpdateWeightsFromIPC",
    "init_weights_update_group": "InitWeightsUpdateGroup",
}


def refuse_without_recorder(self):
    if freekv_config(self.server_args) is None:
        return
    server_args = release.settings_of(self.server_args)
    if server_args.expert_distribution_recorder_mode is None:
        from fastapi import HTTPException  # this endpoint turns no other error into an answer

        raise HTTPException(
            400, "This server records no expert distribution; start it with --expert-distribution-recorder-mode."
        )


def refuse_to_release_memory(self, *args, **kwargs):
    if freekv_config(self.server_args) is not None:
        raise ValueError("CPU memory that holds the KV cannot be released and taken again; stop and start the server.")


def answer_failed_update(message: str) -> Callable:
    """Hook that answers with `message` of SGLang's, and no success, where a change of weights raises."""

    def update_weights(original, self, recv_req):
        try:
            return original(self, recv_req)
        except Exception as error:
            if freekv_config(self.tp_worker.model_runner.server_args) is None:
                raise
            logger.exception("A change of weights has failed; the weights may be changed in part")
            from sglang.srt.managers import io_struct

            sentence = f"{error or type(error).__name__} The weights may be changed in part."
            return getattr(io_struct, message)(success=False, message=sentence)

    return update_weights


PATCHES = (
    *(
        Patch(
            target=f"{_TOKENIZER}.{name}",
            kind=HookType.BEFORE,
            hook=refuse_without_recorder,
            signature="(self: 'TokenizerManager')",
            reason="a scheduler without a recorder raises, which ends the server",
            remove_when="SGLang answers this with an error",
        )
        for name in _RECORDER
    ),
    *(
        Patch(
            target=f"{_TOKENIZER}.{name}",
            kind=HookType.BEFORE,
            hook=refuse_to_release_memory,
            signature=(
                f"(self: 'TokenizerManager', obj: '{message}MemoryOccupationReqInput', "
                "request: 'Optional[fastapi.Request]' = None)"
            ),
            reason="the scheduler raises where it is busy, or where nothing was released, which ends the server",
            remove_when="SGLang answers this with an error",
        )
        for name, message in _MEMORY.items()
    ),
    *(
        Patch(
            target=f"{_WEIGHTS}.{name}",
            kind=HookType.AROUND,
            hook=answer_failed_update(f"{message}ReqOutput"),
            signature=f"(self, recv_req: '{message}ReqInput')...",
            reason="weights that do not load, or a group that does not exist, raise, which ends the server",
            remove_when="SGLang answers this with an error",
        )
        for name, message in UPDATES.items()
    ),
)
