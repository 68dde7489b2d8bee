"""The tasks of the accuracy harness, by name."""

from benchmarks.accuracy.tasks import aggregate, copy, generation, lookup, shared, walk
from benchmarks.accuracy.tasks.session import Task

TASKS: dict[str, Task] = {
    task.name: task for family in (lookup, walk, copy, aggregate, shared, generation) for task in family.TASKS
}
