"""Run one phase:  python -m benchmarks.gpu PHASE --out DIR --seconds N [--model-shape S] [--rehearse]"""

from __future__ import annotations

import argparse
import logging
import os
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.phases import PHASES
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=[phase.name for phase in PHASES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--model-shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    phase = next(phase for phase in PHASES if phase.name == args.phase)
    if args.rehearse and phase.has_kernels:
        os.environ["TRITON_INTERPRET"] = "1"  # chosen when a kernel is defined
    session = Session(phase.name, args.out, args.seconds, args.model_shape, args.rehearse)
    getattr(import_module(f"benchmarks.gpu.{phase.module}"), phase.function)(session)


if __name__ == "__main__":
    main()
