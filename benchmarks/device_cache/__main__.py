"""Hits of the device cache against its blocks, and the looks that its claims take: 32 requests of 32K, one layer.

python -m benchmarks.device_cache --rule NAME

Against a real model: `benchmarks.real_model --windows N`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.device_cache.replay import FIRST, Replay
from benchmarks.device_cache.windows import CHURN, drifting_windows, turnover
from benchmarks.records import RESULTS, RecordWriter

# 32K tokens and a budget of 2,048 in pages of 32; the first and latest 128 tokens are fixed.
_BATCH, _NUM_KV_HEADS, _NUM_PAGES, _WIDTH, _NUM_FIXED = 32, 8, 1024, 64, 4


def main() -> None:
    args = _parse()
    writer = RecordWriter("device_cache", args.out)
    for name in args.churn:
        _replay(name, args, writer)


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
    parser.add_argument(
        "--rule", required=True, help="what the records call the rule that this code has; it chooses nothing"
    )
    parser.add_argument("--churn", nargs="+", default=list(CHURN), choices=CHURN, help="how windows move")
    windows = [2.0, 2.5, 3.0, 4.0]
    parser.add_argument("--windows", type=float, nargs="+", default=windows, help="of blocks for each request")
    parser.add_argument("--steps", type=int, default=24, help="decode steps")
    out = RESULTS / "device_cache_replay.jsonl"
    parser.add_argument("--out", type=Path, default=out, help="file of records")
    return parser.parse_args()


if __name__ == "__main__":
    main()
