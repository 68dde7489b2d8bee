"""A failed audit turns the server red before it ends: /health, the metrics and the log say so.

SGLang ends the whole server when its scheduler raises, at once and without a word to those who watch it. Here the
scheduler first stops, so that no further token leaves; SIGTERM makes the server's main process answer /health with 503,
as before every planned end, and leaves /metrics readable; after `GRACE_S` the error is raised.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from sglang_freekv.algorithm.audit import AuditError
from sglang_freekv.memory.counters import Counters
from sglang_freekv.serving.metrics import publish_last_words

logger = logging.getLogger(__name__)

GRACE_S = 15  # one scrape interval of a common Prometheus


@contextmanager
def audited(counters: Counters, save_evidence: Callable[[AuditError], None]) -> Iterator[None]:
    """Count what is audited in the block; where the audit fails, turn the server red and then raise.

    Parameters
    ----------
    save_evidence
        Writes down what the batch looked like.

    Raises
    ------
    AuditError
        `GRACE_S` after it was raised in the block.
    """
    counters.audited_batches += 1
    try:
        yield
    except AuditError as error:
        counters.audit_failures += 1
        logger.critical(
            f"FreeKV's audit failed: {error}. Further output could be wrong, so none is sent: /health answers 503, and "
            f"the server ends in {GRACE_S} s. Restart it, and report this."
        )
        publish_last_words({"audited_batches": counters.audited_batches, "audit_failures": counters.audit_failures})
        _turn_red()
        save_evidence(error)
        time.sleep(GRACE_S)
        raise


def _turn_red() -> None:
    """Ask the main process, which started this scheduler, to shut down: from now on it tells so under /health."""
    if (parent := psutil.Process().parent()) is not None:
        parent.send_signal(signal.SIGTERM)
