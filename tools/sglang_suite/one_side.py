"""Run test files of SGLang in forks of one process, plain or with the plug-in active; `__main__` starts it.

SGLang is imported once: that takes longer than most of its unit tests.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sglang_freekv.testing.tiny_model import TinyModel
from tools.sglang_suite.files import LEFT_OUT
from tools.sglang_suite.table import Outcomes, outcomes_path

# Tests send token ids up to 31,999.
MODEL = TinyModel(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, vocab=32768, dtype="float32")
# Of every server that a test starts; the test's own flags come after them, and win.
FLAGS = ("--dtype", "float32", "--max-total-tokens", "32768", "--max-running-requests", "64", "--sleep-on-idle")
# Tests of the API leave the end of an answer to the model. Random weights do not end it, so the context does.
API_TESTS, API_FLAGS = ("openai_server/", "core/"), ("--context-length", "1024")
FREEKV_FLAGS = ("--kv-retrieval", "freekv", "--freekv-audit")
FILE_TIMEOUT_S = 3600

_REASON_CHARACTERS = 160
_WORST_LAST = ("passed", "skipped", "failed")


class Tally:
    """A pytest plug-in that keeps each test's outcome."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        test = report.nodeid.removeprefix("registered/")
        before, _ = self.outcomes.get(test, ("passed", ""))  # by a subtest, or its setup
        if _WORST_LAST.index(report.outcome) >= _WORST_LAST.index(before):
            self.outcomes[test] = (report.outcome, _reason(report))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of what a test says about itself, without folders of this machine."""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        text = report.longrepr[2].removeprefix("Skipped: ")
    elif chain := getattr(report.longrepr, "chain", None):  # of exceptions, the cause first
        text = chain[0][1].message if chain[0][1] else ""
    else:  # of a file that cannot be imported: a traceback, and the error in lines that begin with E
        text = str(report.longrepr or "").rpartition("\nE  ")[2]
    return re.sub(r"(?<![\w:/])/[^\s'\"]*/", "", text.strip().partition("\n")[0])[:_REASON_CHARACTERS]


def prepare(side: str, model: Path) -> None:
    """Import SGLang, activate the plug-in or not; tests get `model` and random prompts for what they would download."""
    import sglang.srt.entrypoints.http_server  # noqa: F401  and with it nearly everything
    from sglang.srt.plugins import load_plugins
    from sglang.test import test_utils
    from sglang.test.kits import cache_hit_kit

    load_plugins()
    flags = FLAGS
    if side == "plug-in":
        flags += FREEKV_FLAGS
        _put_in_place()
    for name in ("DEFAULT_MODEL_NAME_FOR_TEST", "DEFAULT_SMALL_MODEL_NAME_FOR_TEST"):
        setattr(test_utils, name, str(model))
    sample = functools.partial(cache_hit_kit.sample_random_requests, random_sample=False)
    cache_hit_kit.sample_random_requests = sample
    _start_servers_with(flags)


def _start_servers_with(flags: tuple[str, ...]) -> None:
    from sglang.test import test_utils

    launch = test_utils._launch_server_process

    def launch_with_flags(command: list[str], env: dict[str, str], *args, **kwargs):
        env.pop("SGLANG_ENABLE_METRICS_DEVICE_TIMER", None)  # of a GPU
        return launch([*command[:4], *flags, *command[4:]], env, *args, **kwargs)  # sglang serve --model-path MODEL

    test_utils._launch_server_process = launch_with_flags


def _put_in_place() -> None:
    """Patch SGLang as on a FreeKV server, and let tests build our radix cache and allocator where they ask for its."""
    from sglang.srt.mem_cache import allocator, radix_cache
    from sglang.srt.mem_cache.allocator import paged

    from freekv_patches.plugin import activate
    from sglang_freekv.cpu.allocator import CpuPagedAllocator
    from sglang_freekv.serving.radix_cache import FreeKVRadixCache

    activate()
    radix_cache.RadixCache = FreeKVRadixCache
    allocator.PagedTokenToKVPoolAllocator = paged.PagedTokenToKVPoolAllocator = CpuPagedAllocator


def _refuse() -> None:
    raise RuntimeError("Found no NVIDIA driver")


def run_file(registered: Path, file: str, out: Path) -> None:
    """Run one file in this process, which is a fork, and write its outcomes to `out`."""
    os.setsid()
    with out.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.cuda._lazy_init = _refuse  # as without a fork
    folders = [str((registered / file).parent), os.environ["PYTHONPATH"]]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # servers load what a test's module pickles
    if file.startswith(API_TESTS):
        _start_servers_with(API_FLAGS)
    tally = Tally()
    left_out = [f"--deselect=registered/{test}" for test in LEFT_OUT if test.startswith(f"{file}::")]
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", str(registered.parent / "pytest.ini")]
    pytest.main([*options, *left_out, str(registered / file)], plugins=[tally])
    out.write_text(json.dumps(tally.outcomes))
    sys.stdout.flush()
    os._exit(0)  # whatever the tests have left running


def main() -> None:
    """Take side, test/registered of SGLang's sources, folder of outcomes, files; print each file's outcomes as JSON."""
    side, registered, out, *files = sys.argv[1:]
    if torch.accelerator.is_available():
        raise SystemExit(
            "error: files run in forks of one process, which cannot share a GPU; use a machine without one"
        )
    MODEL.write(Path(out, "model"))
    prepare(side, Path(out, "model"))
    fork = multiprocessing.get_context("fork")
    for file in files:
        result = outcomes_path(Path(out), file)
        process = fork.Process(target=run_file, args=(Path(registered), file, result))
        process.start()
        process.join(FILE_TIMEOUT_S)
        with suppress(ProcessLookupError):  # with the servers that it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        outcomes = json.loads(result.read_text()) if result.exists() else {file: ("failed", "it did not end")}
        print(json.dumps([file, outcomes]), flush=True)


if __name__ == "__main__":
    main()
