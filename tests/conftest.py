"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter, which is chosen when they are defined. Processes that tests start
# must not inherit the choice.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  imported later by the interpreter, it would miss the choice

    import freekv_kernels

    freekv_kernels.triton_ops()
    del os.environ["TRITON_INTERPRET"]


# Parallel workers take units in this order: the shared servers' files together, then those with servers of their own,
# which take minutes and must not come last, then file by file.
_SHARED_SERVERS = "tests/server/"
_OWN_SERVERS = (
    "tests/server/test_accuracy_quick.py",
    "tests/server/oracles/test_soak_quick.py",
    "tests/server/test_engine.py",
    "tests/server/test_faults.py",
    "tests/server/oracles/test_kl_oracles.py",
    "tests/server/oracles/test_scheduler_scripts.py",
)
_ORDER = (_SHARED_SERVERS, *_OWN_SERVERS)


def _unit(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return _SHARED_SERVERS if file.startswith(_SHARED_SERVERS) and file not in _OWN_SERVERS else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.index(unit) if (unit := _unit(item.nodeid)) in _ORDER else len(_ORDER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    config.option.loadscopereorder = False  # it would begin with the files that have most tests
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
