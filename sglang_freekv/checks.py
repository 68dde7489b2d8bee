"""What a setting must be: a test, and the same in words. Imports the standard library only, as `config` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_MAX_GIB = 1 << 20


def layer_numbers(text: str) -> tuple[int, ...]:
    """Parse "0,1" to (0, 1)."""
    return tuple(int(layer) for layer in text.split(",") if layer.strip())


class Check(NamedTuple):
    """What a setting must be, as a test and in words."""

    holds: Callable[[Any], bool]
    expected: str


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def listed(values: Iterable[Any]) -> str:
    """List the choices: "16, 32 or 64"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"


def one_of(values: tuple) -> Check:
    return Check(lambda value: any(type(value) is type(one) and value == one for one in values), listed(values))


def between(low: float, high: float) -> Check:
    return Check(lambda value: is_number(value) and low <= value <= high, f"a number from {low} to {high}")


def is_layers(value: Any) -> bool:
    is_tuple = isinstance(value, tuple) and all(is_int(layer) and layer >= 0 for layer in value)
    return is_tuple and len(set(value)) == len(value)


GIB = Check(lambda value: is_number(value) and 0 < value <= _MAX_GIB, f"GiB, more than 0 and at most {_MAX_GIB:,}")
LAYERS = Check(is_layers, 'distinct layer numbers from 0, for example "0,1"')
SWITCH = Check(lambda value: isinstance(value, bool), "True or False")
FOLDER = Check(lambda value: isinstance(value, str) and value != "", "the path of a folder")
