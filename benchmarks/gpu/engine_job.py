"""Run `sgl.Engine` in a process of its own, as spawning needs a main module:  engine_job.py JOB.json

The job has the engine's keywords, and a list of calls (keywords of `Engine.generate`). Replies, seconds of the start
and of each call, and what `/server_info` says under "freekv" before each call and at the end go to JOB.replies.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import sglang as sgl


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    start = time.monotonic()
    engine = sgl.Engine(**job["engine"])
    started = time.monotonic() - start

    def freekv() -> dict:
        return engine.get_server_info()["internal_states"][0].get("freekv", {})

    replies, states, seconds = [], [], []
    for call in job["calls"]:
        states.append(freekv())
        begin = time.monotonic()
        reply = engine.generate(**call)
        seconds.append(time.monotonic() - begin)
        replies.append(reply if isinstance(reply, list) else [reply])
    states.append(freekv())
    result = {"replies": replies, "states": states, "seconds": seconds, "start_seconds": started}
    path.with_suffix(".replies.json").write_text(json.dumps(result))
    engine.shutdown()


if __name__ == "__main__":
    main()
