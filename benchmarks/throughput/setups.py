"""The servers that are compared: plain SGLang, FreeKV, and FreeKV with one setting changed. Flags as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig

GIB = 1 << 30
PLAIN, FREEKV = "plain SGLang", "freekv"
_PAGE_SIZE = 32


@dataclass(frozen=True)
class Setup:
    """A server."""

    name: str
    flags: tuple[str, ...]
    budget: int | None = None  # tokens; None: attends to everything
    equal_to: str | None = None  # the setup whose device bytes its KV cache gets; it is started before


@dataclass(frozen=True)
class Retrieval:
    """FreeKV's settings as far as the ablations change them."""

    budget: int  # tokens
    windows: int = 2  # per running request that the device blocks hold, at least 2; 0: blocks for every token
    flags: tuple[str, ...] = ()

    def setup(self, name: str, common: Common) -> Setup:
        flags = ["--kv-retrieval", "freekv", "--freekv-budget", str(self.budget)]
        # Two halves of one layer's prefix: the default is made for large models, and would outweigh a small one's KV.
        flags += ["--freekv-arena", str(common.arena)]
        tokens = common.requests * self.windows * self.budget if self.windows else common.tokens
        gib = (tokens + _PAGE_SIZE) * common.token_bytes / GIB  # one page more, for rounding
        flags += ["--freekv-device-blocks-memory", f"{gib:.9f}"]
        return Setup(name, (*common.flags, *flags, *self.flags, *common.freekv_flags), self.budget)


@dataclass(frozen=True)
class Common:
    """What all servers of a phase share."""

    model: Path | str
    dtype: str  # as SGLang names it
    tokens: int  # --max-total-tokens
    requests: int  # --max-running-requests
    chunk: int  # tokens of prompts that are read at once, without a GPU
    arena: int = 2048  # tokens
    server_flags: tuple[str, ...] = ()  # the user's, for every server; they win
    freekv_flags: tuple[str, ...] = ()  # the user's, for FreeKV

    @property
    def flags(self) -> tuple[str, ...]:
        flags = f"--page-size {_PAGE_SIZE} --max-running-requests {self.requests} --max-total-tokens {self.tokens}"
        # A frozen server is not a hung one.
        flags += f" --dtype {self.dtype} --decode-log-interval 8 --watchdog-timeout 100000 --random-seed 0"
        if not torch.cuda.is_available():
            flags += " --device cpu --sampling-backend pytorch --sleep-on-idle"
            # Prompts in one piece: plain SGLang's attention on a CPU reads the whole prefix again for each further one.
            # A large piece takes memory beside the static share.
            flags += f" --chunked-prefill-size {self.chunk} --max-prefill-tokens {self.chunk} --mem-fraction-static 0.8"
        return ("--model-path", str(self.model), *flags.split(), *self.server_flags)

    @cached_property
    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers and heads, as plain SGLang stores them."""
        config = AutoConfig.from_pretrained(self.model).get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize

    def plain(self) -> Setup:
        return Setup(PLAIN, self.flags)


def ablations(budget: int) -> dict[str, Retrieval]:
    """FreeKV with one setting changed at a time; the first as it is."""
    base = Retrieval(budget)
    changed = {
        "speculation off (tau 2)": ("--freekv-tau", "2"),
        "correction off (tau -1)": ("--freekv-tau", "-1"),
        "resident cache off (every page fetched)": ("--freekv-refetch",),
        "pages of 16": ("--page-size", "16"),
        "pages of 64": ("--page-size", "64"),
        "key bits 0": ("--freekv-key-bits", "0"),
        "key bits 1": ("--freekv-key-bits", "1"),
        "key bits 4": ("--freekv-key-bits", "4"),
    }
    return {
        FREEKV: base,
        **{name: replace(base, flags=flags) for name, flags in changed.items()},
        "blocks for 4 windows": replace(base, windows=4),
        "blocks for everything": replace(base, windows=0),
        f"budget {budget // 2}": replace(base, budget=budget // 2),
        f"budget {budget * 2}": replace(base, budget=budget * 2),
    }
