"""The server that is soaked: a model that is cheap to run, on few host pages and device blocks, checked strictly."""

from __future__ import annotations

from sglang_freekv.testing.tiny_model import TinyModel

MODEL = TinyModel(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, dtype="float32")
BUDGETS = (96, 128, 160)  # tokens that requests ask for; far below most prompts
HOST_TOKENS = 8448  # one request of the largest kind and a few small ones
MAX_PROMPT_TOKENS = 8192

FLAGS = (
    "--kv-retrieval freekv --dtype float32 --chunked-prefill-size 1024 --freekv-arena 2048 "
    f"--max-total-tokens {HOST_TOKENS} --freekv-budget {BUDGETS[0]} --freekv-max-budget {BUDGETS[-1]} "
    # The windows of 16 requests, and half of what the host store holds.
    "--freekv-sink 32 --freekv-recent 32 --freekv-device-blocks-memory 0.005"
).split()

# SGLang's own checks: free + tree + running = store, in every step and while idle.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
# Requests are admitted as if they stopped at once. They do not, and some are retracted.
HASTE = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "1"}
