"""Run `sgl.Engine` in a process of its own, as spawning needs a main module:  engine_script.py JOB.json

A job has the engine's keywords, and a list of requests (keywords of `Engine.generate`). The list of replies is written
to JOB.replies.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sglang as sgl


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    engine = sgl.Engine(**job["engine"])
    replies = [engine.generate(**request) for request in job["requests"]]
    engine.shutdown()
    path.with_suffix(".replies.json").write_text(json.dumps(replies))


if __name__ == "__main__":
    main()
