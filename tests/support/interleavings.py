"""Programs of one launch on a GPU, simulated: one memory operation at a time, in an order that chance decides.

A program is a generator that yields between its memory operations, and WAITING where it looks in vain for what another
has to do. Few run at once, and they start in any order. Plain stores arrive late and in any order, and plain loads may
return what was in a cell when the program last acquired. Atomics, and loads past the first cache, are never stale.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator

WAITING, _DONE = object(), object()


class Deadlock(Exception):
    """Every running program waits, and none can start."""


class Memory:
    """What all programs see in the end."""

    def __init__(self, cells: dict[Hashable, int], rng: random.Random) -> None:
        self.cells, self.rng = cells, rng


class Program:
    """One program's view of the memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._stores: list[tuple[Hashable, int]] = []  # on their way
        self._acquired = dict(memory.cells)

    def load(self, cell: Hashable) -> int:
        own = [value for stored, value in self._stores if stored == cell]
        return own[-1] if own else self._memory.rng.choice((self._acquired, self._memory.cells))[cell]

    def load_fresh(self, cell: Hashable) -> int:
        """Not from the first cache."""
        self._arrive(cell)
        return self._memory.cells[cell]

    def store(self, cell: Hashable, value: int) -> None:
        self._stores.append((cell, value))

    def update(self, cell: Hashable, change: Callable[[int], int]) -> int:
        """A relaxed atomic operation; what was there before."""
        before = self.load_fresh(cell)
        self._memory.cells[cell] = change(before)
        return before

    def add(self, cell: Hashable, number: int) -> int:
        return self.update(cell, lambda value: value + number)

    def swap(self, cell: Hashable, expected: int, value: int) -> bool:
        """Compare and swap; whether it succeeded."""
        return self.update(cell, lambda before: value if before == expected else before) == expected

    def release(self, counter: Hashable) -> None:
        """Add one, after all stores."""
        self.finish()
        self.add(counter, 1)

    def acquire(self, counter: Hashable) -> int:
        """Load; later loads see at least what those had stored who added what is seen."""
        self._acquired = dict(self._memory.cells)
        return self._memory.cells[counter]

    def let_a_store_arrive(self) -> None:
        if self._stores:
            self._arrive(self._memory.rng.choice(self._stores)[0])

    def finish(self) -> None:
        """All stores arrive."""
        for cell, value in self._stores:
            self._memory.cells[cell] = value
        self._stores = []

    def _arrive(self, cell: Hashable) -> None:
        for stored, value in self._stores:
            if stored == cell:
                self._memory.cells[cell] = value
        self._stores = [(stored, value) for stored, value in self._stores if stored != cell]


def run_interleaved(
    memory: Memory, start: Callable[[Program, int], Iterator[object]], num_programs: int, most_at_once: int
) -> None:
    """Run `start(program, index)` of every index to its end.

    Raises
    ------
    Deadlock
    """
    rng, to_start = memory.rng, memory.rng.sample(range(num_programs), num_programs)
    running: dict[Program, Iterator[object]] = {}
    in_vain: set[Program] = set()  # have waited since anything was done
    while to_start or running:
        if to_start and len(running) < most_at_once:
            program = Program(memory)
            running[program] = start(program, to_start.pop())
        elif in_vain.issuperset(running):
            raise Deadlock
        program = rng.choice(list(running))
        did = next(running[program], _DONE)
        if did is WAITING:
            in_vain.add(program)
        else:
            in_vain.clear()
        if did is _DONE:
            program.finish()
            del running[program]
        for other in running:
            if rng.random() < 0.3:
                other.let_a_store_arrive()
