"""A pytest plug-in: several processes share the tests that each of them collects, and each test runs in one of them.

Kernels are compiled by the test that first needs them, so some tests take a hundred times as long as others, and tests
of one file are no share of the work. A process takes the next test whenever it is done with one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share-tests", metavar="FOLDER", help="where processes note which tests they have taken")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run what no other process has taken; one test is taken ahead, as pytest asks which is next."""
    taken = _take(session)
    item = next(taken, None)
    while item is not None:
        following = next(taken, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    return True


def _take(session: pytest.Session) -> Iterator[pytest.Item]:
    folder = session.config.getoption("--share-tests")
    for number, item in enumerate(session.items):
        try:
            os.close(os.open(f"{folder}/{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield item


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A process that came too late for any test has not failed."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.testscollected:
        session.exitstatus = pytest.ExitCode.OK
