"""What more device blocks for each running request save, as measured."""

from __future__ import annotations

# Windows of blocks for each request -> recalls, where two windows recall 1: the oldest of four blocks go, and windows
# change as a language model's do under tau 0.9, in a long generation. Source:
# benchmarks/results/device_cache_replay.jsonl, mean of its churns.
RECALLS = {2: 1.0, 3: 0.64, 4: 0.44}
