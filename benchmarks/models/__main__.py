"""Models that FreeKV serves: small checkpoints with random weights, each run with plain SGLang and with FreeKV.

    python -m benchmarks.models [--device cpu|cuda] [--dtype float16] [--only NAME,..]

Two engines answer each model, one after the other: plain SGLang, and FreeKV with --freekv-audit. Three prompts of
ragged lengths, read in chunks, must give plain SGLang's tokens where the budget covers them: every one in float32; in
16 bits rounding decides near ties, so the largest difference of log-probabilities stands beside the share of equal
tokens. Three longer prompts are far over their budget, and over the device blocks: they must finish, recall pages and
never attend to a page that is absent. What the audit finds ends its engine.

A model has one record per dtype and device; a run replaces the one before.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.models.compare import MODELS, EngineFailed, Outcome, make_model, run_model
from benchmarks.records import RESULTS, RecordWriter, read_records
from sglang_freekv.testing.tiny_model import TinyModel
from sglang_freekv.testing.tiny_sliding_model import TinySlidingModel


def describe(name: str, model: TinyModel | TinySlidingModel, device: str) -> dict[str, int | str]:
    """The parameters that a record is known by."""
    return {
        "model": name,
        "architecture": model.hf_config()["architectures"][0],
        "head_dim": model.head_dim,
        "group": model.heads // model.kv_heads,
        "dtype": model.dtype,
        "device": device,
    }


def write_record(writer: RecordWriter, known_by: dict[str, int | str], outcome: Outcome) -> None:
    """Append the record of a model, in place of its last one."""
    if writer.path.exists():
        others = [r for r in read_records(writer.path) if not known_by.items() <= r.params.items()]
        writer.path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in others))
    measured = {
        "logprob_difference": float(f"{outcome.logprob_difference:.1e}"),
        "recalled_blocks": outcome.recalled_blocks,
        "absent_pages": outcome.absent_pages,
        "audit": "passed" if outcome.passes_audit else "FAILED",
    }
    writer.write("equal_tokens", outcome.equal_tokens, "ratio", known_by | measured)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--only", help=f"models, separated by commas, of {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "models.jsonl", help="file of the records")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.names = args.only.split(",") if args.only else list(MODELS)
    if unknown := set(args.names) - set(MODELS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; the models are {', '.join(MODELS)}")
    return args


def main() -> int:
    args = parse_args()
    writer, failed = RecordWriter("models", args.out), []
    for name in args.names:
        model = make_model(name, args.dtype)
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = run_model(model, args.device, Path(folder))
            except EngineFailed as error:
                print(f"{name}: {error}", flush=True)
                failed.append(name)
                continue
        print(f"{name}: {outcome}", flush=True)
        write_record(writer, describe(name, model, args.device), outcome)
        if not outcome.passes_audit or (args.dtype == "float32" and outcome.equal_tokens < 1):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
