"""SGLang's own test kits from the installed wheel, as its servers' tests use them, on both sides of one comparison.

They are about bookkeeping (cached tokens, sessions, aborts), so a tiny model with random weights runs them; flags and
variables are those that the kits ask for. A kit that is written for another kind of server fails on both sides.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import unittest
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NamedTuple
from unittest import mock

from transformers import AutoTokenizer

from benchmarks.server import Server
from benchmarks.suites.sides import PLAIN, Side
from benchmarks.suites.steps import Step, Suites
from benchmarks.throughput.setups import PLAIN as BASELINE
from sglang_freekv.testing.tiny_model import TinyModel
from tools.sglang_suite.table import Outcomes, differences

MODEL = TinyModel(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, vocab=32768, dtype="float32")
_BUDGET = 320  # tokens; most of the tests' requests are longer
_POOL = 32768  # tokens
_REASON_CHARACTERS = 120
_STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


class Kit(NamedTuple):
    """Tests that SGLang ships."""

    module: str  # in sglang.test.kits
    name: str  # of its class, or of a function that is a test
    sizes: Mapping[str, int] = MappingProxyType({})  # attributes of the class, or arguments of the function


@dataclass(frozen=True)
class Group:
    """Kits that ask for the same server."""

    name: str
    kits: tuple[Kit, ...]
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    requests: int = 64


GROUPS = (
    Group(
        "prefix cache",
        (
            Kit("cache_hit_kit", "run_multiturn_cache_hit_test"),
            Kit("prefix_cache_branching_kit", "PrefixCacheBranchingMixin", {"cache_chunk_size": 64}),
            Kit("radix_cache_server_kit", "run_radix_attention_test"),
            Kit("abort_timeout_kit", "AbortAllMixin"),
        ),
    ),
    Group(
        "streaming sessions",
        (Kit("streaming_session_kit", "StreamingSessionKitMixin"),),
        ("--enable-streaming-session", "--chunked-prefill-size", "128"),
        _STRICT,
    ),
    Group(
        "aborts of sessions",
        (Kit("streaming_session_kit", "AbortLeakReproKitMixin"),),
        ("--enable-streaming-session", "--chunked-prefill-size", "4096", "--context-length", "512"),
        _STRICT,
    ),
    Group(
        "timeout of the queue",
        (Kit("abort_timeout_kit", "WaitingTimeoutMixin"),),
        env={"SGLANG_REQ_WAITING_TIMEOUT": "0.001"},
        requests=1,
    ),
    Group(
        "timeout of a request",
        (Kit("abort_timeout_kit", "RunningTimeoutTwoWaveMixin"),),
        env={"SGLANG_REQ_RUNNING_TIMEOUT": "3"},
    ),
)


def steps(suites: Suites) -> list[Step]:
    """A step for each server that kits ask for."""
    cost = 60 * (1 + len(suites.methods))
    groups = GROUPS[:1] if suites.is_quick else GROUPS
    return [Step(f"SGLang's kits: {group.name}", cost, functools.partial(_compare, suites, group)) for group in groups]


def _compare(suites: Suites, group: Group) -> None:
    model = suites.folder / "kits" / "model"
    if not model.exists():
        MODEL.write(model)
    plain = _outcomes(suites, PLAIN, group, model)
    for method in suites.methods:
        side = Side(method, _BUDGET)
        for kit, ours in _outcomes(suites, side, group, model).items():
            print("".join(f"{line}\n" for line in differences(plain[kit], ours)), end="")
            for test in plain[kit] | ours:
                params = {"suite": "kits", "kit": kit, "test": test, "reason": _reason(ours, plain[kit], test)}
                values = [float(found.get(test, ("",))[0] == "passed") for found in (ours, plain[kit])]
                compared = {"baseline": BASELINE, "baseline_value": values[1]}
                suites.writer.write("passed", values[0], "of 1", {**params, **side.params}, **compared)


def _outcomes(suites: Suites, side: Side, group: Group, model: Path) -> dict[str, Outcomes]:
    """Run a group's kits on a server of its own; by kit."""
    name = f"{group.name.replace(' ', '-')}-{side.name}"
    sizes = {"model": model, "tokens": _POOL, "requests": group.requests}
    with (
        suites.servers.start(side, name, *group.flags, env=group.env, **sizes) as server,
        (suites.folder / "kits" / f"{name}.txt").open("w") as log,
        contextlib.redirect_stdout(log),
    ):
        return {kit.module: run_tests(make_case(kit, server, model)) for kit in group.kits}


def _reason(ours: Outcomes, plain: Outcomes, test: str) -> str:
    """Why it has not passed, where it has not: ours, and plain SGLang's only where ours has passed."""
    return ours.get(test, ("", ""))[1] or plain.get(test, ("", ""))[1]


def make_case(kit: Kit, server: Server, model: Path) -> type[unittest.TestCase]:
    """The tests of a kit against a server, as a class of unittest."""
    module = importlib.import_module(f"sglang.test.kits.{kit.module}")
    found = getattr(module, kit.name)
    if isinstance(found, type):
        there = {
            "base_url": server.url,
            "process": server,
            "tokenizer": AutoTokenizer.from_pretrained(model),
            "flush_cache": staticmethod(server.flush_cache),
        }
        return type(kit.name, (found, unittest.TestCase), {**there, **kit.sizes})

    def test(_: unittest.TestCase) -> None:
        needs_model = {"model_path": str(model)} if "model_path" in found.__code__.co_varnames else {}
        with _random_prompts(module):
            found(base_url=server.url, **needs_model, **kit.sizes)

    return type(kit.name, (unittest.TestCase,), {f"test_{kit.name}": test})


def _random_prompts(module: ModuleType) -> contextlib.AbstractContextManager:
    """Where a kit samples prompts, they are random tokens: it would sample them from a file that it downloads."""
    name = "sample_random_requests"
    if not hasattr(module, name):
        return contextlib.nullcontext()
    return mock.patch.object(module, name, functools.partial(getattr(module, name), random_sample=False))


class _Tally(unittest.TestResult):
    """Keeps each test's outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: Outcomes = {}

    def _add(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        self.outcomes[test.id().rpartition(".")[2]] = (outcome, reason)

    def addSuccess(self, test):
        self._add(test, "passed")

    def addSkip(self, test, reason):
        self._add(test, "skipped", reason)

    def addFailure(self, test, err):
        self._add(test, "failed", first_line(err[1]))

    def addError(self, test, err):
        self._add(test, "failed", first_line(err[1]))


def first_line(error: BaseException) -> str:
    """What an exception says first, short."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:_REASON_CHARACTERS]


def run_tests(case: type[unittest.TestCase]) -> Outcomes:
    tally = _Tally()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(tally)
    return tally.outcomes
