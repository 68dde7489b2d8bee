"""Sizes in bytes, and in words for logs and reports."""

from __future__ import annotations

GIB = 1 << 30
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def in_words(num_bytes: float) -> str:
    """Write a size with three digits and the unit that fits.

    >>> in_words(5_368_709)
    '5.12 MiB'
    """
    size, unit = float(num_bytes), 0
    while abs(size) >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return f"{size:.0f} bytes"
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {_UNITS[unit]}"
