"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch

from tools.zygote.client import zygote

# Files of tests/server that use none of the shared servers.
_OWN = ("test_accuracy_quick", "test_baselines", "test_faults", "test_features", "test_sliding_models")
STARTS_ITS_OWN = {f"tests/server/{name}.py" for name in _OWN}

SHARED_SERVERS = "tests/server/"  # one scope: all files there that use them
# The scopes that take longest start first, so that parallel workers end together.
SLOW = (
    SHARED_SERVERS,
    "tests/server/oracles/test_soak_quick.py",
    "tests/tools/test_fuzz_machine.py",
    "tests/kernels/test_compile.py",
    "tests/server/test_faults.py",
    "tests/server/test_accuracy_quick.py",
    "tests/algorithm/test_engine_on_kernels.py",
    "tests/benchmarks/test_gpu_suite.py",
)

# Without a GPU, kernels run in Triton's interpreter, which is chosen when they are defined. Processes that tests start
# must not inherit the choice.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  imported later by the interpreter, it would miss the choice

    import freekv_kernels

    freekv_kernels.triton_ops()
    del os.environ["TRITON_INTERPRET"]


def pytest_configure(config: pytest.Config) -> None:
    """Servers are forked from one zygote for all workers; with a GPU they start anew, as CUDA survives no fork."""
    # For a CPU SGLang compiles Gemma 3's and Cohere2's norms, which takes each server half a minute.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    has_servers = find_spec("sglang") is not None and not all("tests/kernels" in path for path in config.args)
    if has_servers and not hasattr(config, "workerinput") and not torch.cuda.is_available():
        stack = ExitStack()
        stack.enter_context(zygote(os.environ | {"OMP_NUM_THREADS": "1"}))
        config.add_cleanup(stack.close)


def _scope(nodeid: str) -> str:
    """What one worker runs in one go: the tests that use the shared servers, or those of a file."""
    file = nodeid.partition("::")[0]
    is_apart = file in STARTS_ITS_OWN or file.startswith(f"{SHARED_SERVERS}oracles/")
    return SHARED_SERVERS if file.startswith(SHARED_SERVERS) and not is_apart else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With parallel workers, the slow scopes come first; the order is otherwise the one that they were found in."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        place = {scope: number for number, scope in enumerate(SLOW)}
        items.sort(key=lambda item: place.get(_scope(item.nodeid), len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Of parallel workers, one has the shared servers; tests that start their own run beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors of the tests are tiny: more threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """SGLang writes into the environment what it resolves, and servers of other tests would inherit it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("SGLANG_")}
    yield
    for name in [name for name in os.environ if name.startswith("SGLANG_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A failure can be repeated."""
    torch.manual_seed(0)
