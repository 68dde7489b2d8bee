"""Spawned processes: SGLang loads plug-ins in each, before they look at the server's arguments.

The process that starts them knows whether the server is FreeKV's. It tells the children through the
environment, and only while they start, so that a plain server started later from the same process is a
plain one.
"""

from __future__ import annotations

from freekv_patches.announcement import announced_to_children
from freekv_patches.patch import HookType, Patch, freekv_config

_ARGUMENTS = (
    "(cls, server_args: 'ServerArgs', init_tokenizer_manager_func: 'Callable', "
    "run_scheduler_process_func: 'Callable', run_detokenizer_process_func: 'Callable', "
    "port_args: 'Optional[PortArgs]' = None"
)
_RESULT = " -> 'Tuple[TokenizerManager, TemplateManager, PortArgs, SchedulerInitResult, Optional[SubprocessWatchdog]]'"


def launch_subprocesses(original, cls, server_args, *args, **kwargs):
    with announced_to_children(freekv_config(server_args) is not None):
        return original(cls, server_args, *args, **kwargs)


PATCHES = (
    Patch(
        target="sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        kind=HookType.AROUND,
        hook=launch_subprocesses,
        signature={
            "0.5.17": f"{_ARGUMENTS}){_RESULT}",
            "0.5.23": f"{_ARGUMENTS}, placement_group=None){_RESULT}",
        },
        reason="a child loads plug-ins before it sees the arguments, so it is told while it starts",
        remove_when="SGLang hands the server arguments to plug-ins",
    ),
)
