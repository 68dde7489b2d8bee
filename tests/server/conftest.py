"""The servers that the tests of this folder share: they are slow to start."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_freekv.testing.tiny_model import TinyModel
from tools.servers import Server, serve

# Every server computes in float32: identical tokens are expected.
_FLAGS = ("--dtype", "float32", "--chunked-prefill-size", "256", "--enable-cache-report")
_FREEKV = (*_FLAGS, "--kv-retrieval", "freekv")

_STORE_TOKENS = 4096
_BUDGET_TOKENS, _MAX_BUDGET_TOKENS = 128, 256

FLAGS = {
    "plain": (*_FLAGS, "--max-total-tokens", "32768"),
    # Every request is within its budget. Few requests fit the host store, and admission is careless about it.
    "exact": (
        *(*_FREEKV, "--freekv-audit", "--freekv-budget", str(_STORE_TOKENS)),
        *("--max-total-tokens", str(_STORE_TOKENS), "--schedule-conservativeness", "0.1"),
    ),
    # Requests exceed their budget; 16 of them run at most, and then all device blocks are in their windows.
    "narrow": (
        *(*_FREEKV, "--freekv-budget", str(_BUDGET_TOKENS), "--freekv-max-budget", str(_MAX_BUDGET_TOKENS)),
        *("--freekv-sink", "32", "--freekv-recent", "32"),
        *("--freekv-host-memory", "0.05", "--freekv-device-blocks-memory", "0.0235"),
        *("--disable-overlap-schedule", "--enable-metrics", "--decode-log-interval", "10"),
    ),
}

_STRICT_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint; three layers, so that each half of the prefill arena is used again."""
    out = tmp_path_factory.mktemp("model")
    TinyModel(layers=3, dtype="float32").write(out)
    return out


@pytest.fixture(scope="session")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The three servers by name; they start side by side."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack, ThreadPoolExecutor(len(FLAGS)) as pool:

        def start(name: str) -> Server:
            flags = (*FLAGS[name], "--freekv-debug-dump", str(logs / "dumps")) if name == "narrow" else FLAGS[name]
            return stack.enter_context(serve(model, logs / f"{name}.log", *flags, env=_STRICT_CHECKS))

        yield dict(zip(FLAGS, pool.map(start, FLAGS), strict=True))


@pytest.fixture(scope="session")
def plain(servers: dict[str, Server]) -> Server:
    """SGLang without FreeKV."""
    return servers["plain"]


@pytest.fixture
def exact(servers: dict[str, Server]) -> Server:
    """FreeKV, budget at least as long as any request, with an empty prefix cache."""
    servers["exact"].flush()
    return servers["exact"]


@pytest.fixture
def narrow(servers: dict[str, Server]) -> Server:
    """FreeKV, budget shorter than most requests, with an empty prefix cache."""
    servers["narrow"].flush()
    return servers["narrow"]


@pytest.fixture
def dumps(narrow: Server) -> Path:
    """Where `narrow` writes the debug dumps of requests that ask for one."""
    return narrow.log.parent / "dumps"


@pytest.fixture
def full_width() -> dict:
    """Sampling parameters with which a request asks `narrow` for all it may have: exact up to 256 tokens."""
    return {"custom_params": {"freekv_budget": _MAX_BUDGET_TOKENS}}


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Seeded with the name of the test, so that no two tests share a prefix by chance."""
    return random.Random(request.node.originalname)
