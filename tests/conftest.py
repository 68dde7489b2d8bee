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
STARTS_ITS_OWN = {f"tests/server/{name}.py" for name in ("test_accuracy_quick", "test_baselines", "test_faults")}

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
    has_servers = find_spec("sglang") is not None and not all("tests/kernels" in path for path in config.args)
    if has_servers and not hasattr(config, "workerinput") and not torch.cuda.is_available():
        stack = ExitStack()
        stack.enter_context(zygote(os.environ | {"OMP_NUM_THREADS": "1"}))
        config.add_cleanup(stack.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Of parallel workers, one has the shared servers; tests that start their own run beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shares_servers = file.startswith("tests/server/") and file not in STARTS_ITS_OWN
            shares_servers &= not file.startswith("tests/server/oracles/")
            return "tests/server/" if shares_servers else file

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors of the tests are tiny: more threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A failure can be repeated."""
    torch.manual_seed(0)
