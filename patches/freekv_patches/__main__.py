"""Print every target of SGLang that is patched, and whether it is the one the patch was written against."""

from __future__ import annotations

import sys

from freekv_patches.registry import ALL_PATCHES


def main() -> int:
    """Print the table; return 1 where a target does not fit."""
    mismatches = []
    for patch in ALL_PATCHES:
        mismatch = patch.mismatch()
        mismatches += [mismatch] if mismatch else []
        print(f"{'ok ' if mismatch is None else 'BAD'}  {patch.kind.value:<8} {patch.target}")
        print(f"     why: {patch.reason}")
        print(f"     until: {patch.remove_when}")
    print(f"{len(ALL_PATCHES) - len(mismatches)} of {len(ALL_PATCHES)} targets fit this SGLang.")
    for mismatch in mismatches:
        print(mismatch, file=sys.stderr)
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
