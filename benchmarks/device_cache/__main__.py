"""Hits of the device cache against its blocks, and the looks that its claims take.

python -m benchmarks.device_cache model               # SmolLM2 on real text, with 2, 3 and 4 windows of blocks
python -m benchmarks.device_cache replay --rule NAME  # 32 requests of 32K whose windows drift, one layer
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.device_cache.reading import Steps, read_steps
from benchmarks.device_cache.replay import FIRST, Replay
from benchmarks.device_cache.windows import CHURN, drifting_windows, turnover
from benchmarks.methods import parse_method
from benchmarks.real_model.job import Cell, Job
from benchmarks.real_model.processes import run_in_process
from benchmarks.real_model.texts import KINDS, digest, draw_texts, fetch_data
from benchmarks.records import RESULTS, RecordWriter
from freekv_kernels import Count
from tools.pretrained import smollm2_folder

# 32K tokens and a budget of 2,048 in pages of 32; the first and latest 128 tokens are fixed.
_BATCH, _NUM_KV_HEADS, _NUM_PAGES, _WIDTH, _NUM_FIXED = 32, 8, 1024, 64, 4
_FIRST_TOKENS = 8  # of a text's, which fill the cache and are not counted


def main() -> None:
    args = _parse()
    writer = RecordWriter("device_cache", args.out)
    if args.what == "model":
        _read_model(args, writer)
    else:
        for name in args.churn:
            _replay(name, args, writer)


def _read_model(args: argparse.Namespace, writer: RecordWriter) -> None:
    """Decode one text of each kind with every method and number of windows."""
    model = args.model or smollm2_folder()
    job = Job(
        model=str(model),
        dtype="float32",
        device="cpu",
        texts=(),
        contexts=(args.context,),
        num_steps=args.steps,
        every=0,
        windows=0,
        folder=Path(),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = draw_texts(args.kinds, 1, job.num_tokens, tokenizer, args.data or fetch_data(args.kinds))
    job = replace(job, texts=tuple(tuple(text.tokens) for text in texts))
    cells = [Cell(parse_method(method), args.context, args.budget) for method in args.methods]
    shared = {"texts": digest(texts), "steps": args.steps}
    for item in run_in_process(read_steps, job, cells, args.windows):
        if isinstance(item, Steps):
            _write_model(item, shared, writer)


def _write_model(steps: Steps, shared: dict, writer: RecordWriter) -> None:
    counts = steps.counts[_FIRST_TOKENS:].sum(0)
    recalls = counts[Count.RECALLS] / counts[Count.ROWS]
    method, context, budget = steps.cell.method.name, steps.cell.context, steps.cell.budget
    params = {"method": method, "context": context, "budget": budget, "windows": steps.windows, **shared}
    writer.write("recalls", float(recalls), "pages per row and step", params)
    writer.write("hit_share", float(1 - recalls / steps.width), "share", params)
    print(f"{method}, {steps.windows:g} windows: {recalls:.3f} recalls per row and step")


def _replay(name: str, args: argparse.Namespace, writer: RecordWriter) -> None:
    sizes = {"num_pages": _NUM_PAGES, "width": _WIDTH, "num_fixed": _NUM_FIXED}
    pages = drifting_windows(CHURN[name], num_steps=FIRST + args.steps, num_rows=_BATCH * _NUM_KV_HEADS, **sizes)
    shared = {"churn": name, "turnover": round(turnover(pages, _NUM_FIXED), 2), "rule": args.rule}
    requests = pages.view(len(pages), _BATCH, _NUM_KV_HEADS, _WIDTH)
    for windows in args.windows:
        claims = Replay(requests, _NUM_PAGES, windows).run()
        looks, params = claims.looks_per_claim, {**shared, "windows": windows, "steps": args.steps}
        writer.write("hit_share", claims.hit_share, "share", params)
        writer.write("claims", float(claims.evictions.mean()), "blocks per step", params)
        if not len(looks):
            print(f"{name}, {windows:g} windows: the cache was not yet full; give more --steps")
            continue
        writer.write("looks", float(claims.looks.sum() / claims.evictions.sum()), "per claim", params)
        writer.write("looks_p99", float(np.quantile(looks, 0.99)), "per claim", params)
        writer.write("looks_max", float(looks.max()), "per claim", params)
        print(f"{name}, {windows:g} windows: hits {claims.hit_share:.4f}, {looks.mean():.2f} looks per claim")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.device_cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    model, replay = commands.add_parser("model"), commands.add_parser("replay")
    model.add_argument("--model", type=Path, default=None, help="folder of a model (default: SmolLM2, fetched once)")
    model.add_argument("--data", type=Path, default=None, help="folder of the texts (default: fetched once)")
    model.add_argument("--kinds", nargs="+", default=list(KINDS), help="one text of each")
    model.add_argument("--methods", nargs="+", default=["freekv-0.9", "mass-0.5"], help="as of benchmarks.real_model")
    model.add_argument("--context", type=int, default=4096, help="tokens of the prompts")
    model.add_argument("--budget", type=int, default=512, help="tokens")
    replay.add_argument("--rule", required=True, help="what the records call the rule by which blocks are taken")
    replay.add_argument("--churn", nargs="+", default=list(CHURN), choices=CHURN, help="how windows move")
    for command, windows, name in ((model, [2.0, 3.0, 4.0], "model"), (replay, [2.0, 2.5, 3.0, 4.0], "replay")):
        command.add_argument("--windows", type=float, nargs="+", default=windows, help="of blocks for each request")
        command.add_argument("--steps", type=int, default=24, help="decode steps")
        out = RESULTS / f"device_cache_{name}.jsonl"
        command.add_argument("--out", type=Path, default=out, help="file of records")
    return parser.parse_args()


if __name__ == "__main__":
    main()
