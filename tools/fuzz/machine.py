"""The model-based test: any order of what can happen to requests, and every invariant after every step."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sglang.srt.runtime_context import get_context

from sglang_freekv.algorithm.audit import audit_blocks
from tools.fuzz.accounting import check_accounting
from tools.fuzz.scheduler import Life, Scheduler
from tools.fuzz.setups import MAX_PAGES, MAX_TOKENS, PAGE_SIZE, SETUPS, Setup
from tools.fuzz.texts import make_text
from tools.fuzz.windows import WindowChecks

MAX_WAITING = 4
TENANTS = (None, "a", "b")
indices = st.integers(0, 7)


class MemoryMachine(RuleBasedStateMachine):
    """A scheduler that hypothesis drives. A step is one rule, or one token of `decode`; the checks follow each.

    Attributes
    ----------
    steps : Counter
        Steps by name, of all machines of this process.
    seen : Counter
        What the engines counted until their ends.
    """

    steps: ClassVar[Counter[str]] = Counter()
    seen: ClassVar[Counter[str]] = Counter()
    setups: tuple[Setup, ...] = SETUPS

    @initialize(index=indices)
    def start(self, index: int) -> None:
        self.scheduler = Scheduler(self.setups[index % len(self.setups)], get_context().server_args)
        self.windows = WindowChecks(self.scheduler)
        self.scheduler.on_batch = self.windows.after_batch
        self.is_sound = True

    @precondition(lambda self: len(self.scheduler.waiting) < MAX_WAITING)
    @rule(
        story=st.integers(0, 1),
        twist=st.integers(0, MAX_PAGES),
        ending=st.integers(0, 2),
        tenant=st.sampled_from(TENANTS),
        num_prompt=st.integers(1, MAX_TOKENS - 1),
        budget=st.sampled_from((None, 2, 4)),
    )
    def admit(
        self, story: int, twist: int, ending: int, tenant: str | None, num_prompt: int, budget: int | None
    ) -> None:
        text = make_text(MAX_TOKENS, story, 13 * twist, ending, tenant)
        self._step("admit", self.scheduler.admit, text, num_prompt, budget and budget * PAGE_SIZE)

    @precondition(lambda self: self.scheduler.waiting or self.scheduler.active)
    @rule(num_tokens=st.integers(1, MAX_TOKENS), num_steps=st.integers(1, 4), overlap=st.booleans())
    def run(self, num_tokens: int, num_steps: int, overlap: bool) -> None:
        """Prefill if there is something to prefill, as SGLang does, and then decode for a while."""
        if self.scheduler.waiting or self.scheduler.chunked:
            self._step("extend", self.scheduler.extend, num_tokens, overlap)
        self._decode(num_steps, overlap)

    @precondition(lambda self: self.scheduler.waiting or self.scheduler.chunked)
    @rule(num_tokens=st.integers(1, MAX_TOKENS), overlap=st.booleans())
    def extend(self, num_tokens: int, overlap: bool) -> None:
        self._step("extend", self.scheduler.extend, num_tokens, overlap)

    @precondition(lambda self: self.scheduler.running)
    @rule(num_steps=st.integers(1, 8), overlap=st.booleans())
    def decode(self, num_steps: int, overlap: bool) -> None:
        self._decode(num_steps, overlap)

    @precondition(lambda self: self._abortable())
    @rule(how=st.sampled_from(("finish", "abort", "retract")), index=indices)
    def leave(self, how: str, index: int) -> None:
        may = {"finish": self._answered(), "abort": self._abortable(), "retract": self.scheduler.running}[how]
        if may:
            self._step(how, getattr(self.scheduler, how), may[index % len(may)])

    @precondition(lambda self: self.scheduler.tree.evictable_size())
    @rule(num_pages=st.integers(1, 6))
    def evict(self, num_pages: int) -> None:
        self._step("evict", self.scheduler.evict, num_pages * PAGE_SIZE)

    @precondition(lambda self: self.scheduler.in_flight)
    @rule()
    def wait(self) -> None:
        self._step("wait", self.scheduler.settle)

    @precondition(lambda self: self.scheduler.tree.total_size() and len(self._abortable()) < 2)
    @rule()
    def flush(self) -> None:
        """Only where little is left to lose."""
        self._drain()
        self._step("flush", self.scheduler.flush)

    def teardown(self) -> None:
        """When all have left, every page is free or in the tree; when it is flushed, all are free."""
        if getattr(self, "is_sound", False):
            self._drain()
            self._step("evict", self.scheduler.evict, self.scheduler.allocator.size)
            assert self.scheduler.allocator.available_size() == self.scheduler.allocator.size, "pages have leaked"
            MemoryMachine.seen += self.scheduler.seen + Counter(self.scheduler.memory.counters.as_dict())

    def _decode(self, num_steps: int, overlap: bool) -> None:
        for _ in range(num_steps):
            if self.scheduler.running:
                self._step("decode", self.scheduler.decode, overlap)

    def _drain(self) -> None:
        if self.scheduler.in_flight:
            self._step("wait", self.scheduler.settle)
        while abortable := self._abortable():
            self._step("abort", self.scheduler.abort, abortable[0])

    def _answered(self) -> list[Life]:
        return [life for life in self.scheduler.running if life.is_answered]

    def _abortable(self) -> list[Life]:
        chunked = self.scheduler.chunked
        return self._answered() + self.scheduler.waiting + ([chunked] if chunked else [])

    def _step(self, name: str, action, *args) -> None:
        self.is_sound = False
        action(*args)
        check_accounting(self.scheduler)
        self.windows.check()
        if not self.scheduler.in_flight:
            self.scheduler.ledger.check()
            audit_blocks(self.scheduler.memory)
        self.is_sound = True
        MemoryMachine.steps[name] += 1
