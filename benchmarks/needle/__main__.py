"""Train the needle model: a small Qwen3 that answers questions about long documents of the needle language.

    python -m benchmarks.needle --state build/needle --out benchmarks/needle/model

Two CPU cores, within an hour, fixed seed. Interrupted, it goes on where it was; every step draws its samples from
a generator of its own, so the result is the same. Lengths grow from stage to stage.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.needle.checkpoint import draw_curves, sharpen, write
from benchmarks.needle.train import MAX_CONTEXT, SEED, STAGES, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=Path("build/needle"), help="folder to go on from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, made if missing")
    parser.add_argument("--until", choices=[stage.name for stage in STAGES], default=STAGES[-1].name)
    args = parser.parse_args()
    torch.set_num_threads(2)
    trainer = Trainer(args.state)
    trainer.run(args.until)
    start = time.monotonic()
    record = {"seed": SEED, "stages": [asdict(stage) for stage in STAGES], "steps": trainer.step}
    record["sharpen"] = sharpen(trainer.model)
    record |= {"training_minutes": trainer.seconds / 60, "sharpen_minutes": (time.monotonic() - start) / 60}
    write(trainer.model, args.out, MAX_CONTEXT, record)
    draw_curves(args.state / "curve.jsonl", args.out)
    for context, labels in record["accuracy"].items():
        print(f"{context:6} tokens:", *(f"{label} {share:.3f}" for label, share in labels.items()))


if __name__ == "__main__":
    main()
