"""SGLang on a machine without a GPU: the platform plug-in `freekv_cpu`, for plain SGLang and for FreeKV."""

from __future__ import annotations

import logging
import os

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_freekv.tested_release import is_served_release, module_for_release

logger = logging.getLogger(__name__)

_THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"  # SGLang: cores of each tensor-parallel rank, "0,1|2,3"
_NCCL_PATH = "SGLANG_NCCL_SO_PATH"
_NO_LIBRARY = os.devnull
_GRAMMAR_BACKEND = "outlines"  # masks with torch operations; SGLang's default, xgrammar, with a GPU's only


class _NoPools:
    """Of a release that is not served, under which this module is imported, too, and its platform not used."""


Pools = module_for_release("sglang_freekv.cpu.pools").Pools if is_served_release() else _NoPools


def activate() -> str | None:
    """Name the platform class, or None where an accelerator exists or the user runs SGLang's CPU engine.

    And None where SGLang is not a release that it is written for.
    """
    if not is_served_release():
        return None
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return f"{__name__}.CpuPlatform"


class CpuPlatform(Pools, CpuDeviceMixin, SRTPlatform):
    """A CPU without SGLang's CPU kernel library: torch operations, no device graphs, no pinned memory.

    Declared out-of-tree, so that SGLang asks this class for its memory and its attention backend.
    """

    _enum = PlatformEnum.OOT
    _dealt_cores: str | None = None  # what this process put into the environment, for the latest server

    def get_device(self, device_id: int | None = None) -> str:
        """Return "cpu": `ServerArgs` splits the answer at ":", so it is a string."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args) -> None:
        """Replace the defaults that need a GPU or SGLang's CPU kernel library, and give each rank its cores.

        Runs in the process that parses the arguments; spawned ranks inherit the environment.

        Raises
        ------
        ValueError
            If the user chose a grammar backend whose first constrained request would end the server.
        """
        if server_args.attention_backend == "intel_amx":
            logger.info("Attention backend torch_native: intel_amx needs SGLANG_USE_CPU_ENGINE=1.")
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.grammar_backend == "xgrammar":
            raise ValueError(
                "--grammar-backend xgrammar masks tokens on a GPU only, and this machine has none; "
                f"give {_GRAMMAR_BACKEND}, which is the default here, or none."
            )
        server_args.grammar_backend = server_args.grammar_backend or _GRAMMAR_BACKEND
        if os.environ.get(_THREADS_BIND) == CpuPlatform._dealt_cores:  # not the user's choice
            os.environ.pop(_THREADS_BIND, None)
            CpuPlatform._dealt_cores = None
            if server_args.tp_size > 1:
                CpuPlatform._dealt_cores = os.environ[_THREADS_BIND] = split_cores(server_args.tp_size)

    def init_backend(self) -> None:
        """Prepare one rank: no NCCL, which comes with the CUDA build of torch, and its share of the threads.

        One core is left to the processes that tokenize and answer: threads that wait for each other actively
        slow a decode step down tenfold where these take a core away from them. OMP_NUM_THREADS overrides it.
        """
        os.environ.setdefault(_NCCL_PATH, _NO_LIBRARY)
        if "OMP_NUM_THREADS" not in os.environ:
            ranks = len(os.environ.get(_THREADS_BIND, "").split("|"))
            torch.set_num_threads(max(1, (torch.get_num_threads() - 1) // ranks))


def split_cores(num_ranks: int) -> str:
    """Deal this process's cores to ranks in runs, in SGLang's notation; ranks share where cores are short.

    >>> split_cores(2)  # on cores 0 to 3
    '0,1|2,3'
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // num_ranks)
    runs = [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(num_ranks)]
    return "|".join(",".join(map(str, run)) for run in runs)
