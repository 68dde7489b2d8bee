"""Fetch and convert SmolLM2-135M-Instruct where that is not done yet, and print its folder."""

from __future__ import annotations

import argparse
import sys

from tools.pretrained import NotFetched, smollm2_folder


def main() -> int:
    """Print the folder; return 1, with a sentence, where the model cannot be had."""
    argparse.ArgumentParser(prog="python -m tools.pretrained", description=__doc__).parse_args()
    try:
        print(smollm2_folder())
    except NotFetched as why:
        print(f"SmolLM2: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
