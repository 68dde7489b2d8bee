"""Run `sgl.Engine` in a process of its own, as spawning needs a main module:  engine_script.py JOBS.json

A job has the engine's keywords, and a list of requests (keywords of `Engine.generate`). Jobs run one after the other:
side by side they need the memory of both. A list of replies for each is written to JOBS.replies.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sglang as sgl


def run(job: dict) -> list:
    engine = sgl.Engine(**job["engine"])
    replies = [engine.generate(**request) for request in job["requests"]]
    engine.shutdown()
    return replies


def main() -> None:
    path = Path(sys.argv[1])
    path.with_suffix(".replies.json").write_text(json.dumps([run(job) for job in json.loads(path.read_text())]))


if __name__ == "__main__":
    main()
