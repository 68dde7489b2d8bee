"""FreeKV's settings: one frozen dataclass, whose fields are the command line flags and `sgl.Engine` keywords.

Imports the standard library only: spawned processes unpickle it before SGLang has loaded its plug-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

METHOD_OPTION = "kv_retrieval"
OPTION_PREFIX = "freekv_"
BUDGET_PARAM, DUMP_PARAM = "freekv_budget", "freekv_dump"  # keys of a request's `custom_params`
PAGE_SIZES = (16, 32, 64)
KEY_BITS = (0, 1, 2, 4)
SELECTORS = ("codes", "min-max")
GROUP_POOLINGS = ("softmax", "scaled", "max", "mean")
_MAX_GIB = 1 << 20


class UnsupportedConfiguration(ValueError):
    """A setting, or a combination with SGLang's settings or the model, that FreeKV cannot serve."""


def layer_numbers(text: str) -> tuple[int, ...]:
    """Parse "0,1" to (0, 1)."""
    return tuple(int(layer) for layer in text.split(",") if layer.strip())


def _flag(name: str, default: Any, help: str, parse: Callable[[str], Any] = int, **values: Any) -> Any:
    """Declare a field that users set with ``--freekv-<name>`` or the keyword ``freekv_<name>``.

    `values` describes them for argparse: what they are called, or the choices.
    """
    metadata = {"flag": name, "help": help, "parse": parse, "values": values or {"metavar": "TOKENS"}}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FreeKVConfig:
    """What a request may attend to, and the memory for it. Token counts are per request and KV head."""

    budget_tokens: int = _flag(
        "budget", 2048, "tokens a request attends to in each step, sink and recent tokens included"
    )
    # After construction an int: None on the command line means the budget.
    max_budget_tokens: int | None = _flag(
        "max-budget",
        None,
        f'tokens that a request may ask for with custom_params {{"{BUDGET_PARAM}": N}} (default: the budget)',
    )
    sink_tokens: int = _flag("sink", 128, "tokens at the start of the prompt that are always attended to")
    recent_tokens: int = _flag("recent", 128, "latest tokens that are always attended to, at least one page")
    tau: float = _flag(
        "tau",
        0.9,
        "cosine similarity of two steps' queries below which a KV head selects again at once, -1 to 2; "
        "above 1: in every step (exact), -1: never (speculation only)",
        float,
        metavar="COSINE",
    )
    host_memory_gib: float | None = _flag(
        "host-memory",
        None,
        "GiB of CPU memory for the complete KV (default: what is free less a margin)",
        float,
        metavar="GIB",
    )
    device_blocks_memory_gib: float | None = _flag(
        "device-blocks-memory",
        None,
        "GiB of device memory for the resident KV (default: what is left)",
        float,
        metavar="GIB",
    )
    arena_tokens: int = _flag("arena", 32768, "tokens of prefix that prefill lays out at a time, per layer")
    dense_layers: tuple[int, ...] = _flag(
        "dense-layers",
        (),
        'layers that attend to every token, for example "0,1" (default: none)',
        layer_numbers,
        metavar="LAYERS",
    )
    group_pooling: Literal["softmax", "scaled", "max", "mean"] = _flag(
        "group-pooling",
        "softmax",
        "how the query heads of a KV head agree on a page: mean of their softmaxed scores, mean or maximum of those of "
        "scores scaled as in attention (scaled, max), or mean of raw scores",
        str,
        choices=GROUP_POOLINGS,
    )
    selector: Literal["codes", "min-max"] | None = _flag(
        "selector",
        None,
        "what pages are chosen by: their keys in a few bits (codes), or the minimum and maximum of their keys "
        "(min-max) (default: codes, or min-max with --freekv-key-bits 0)",
        str,
        choices=SELECTORS,
    )
    # After construction an int: None means what the selector needs.
    key_bits: int | None = _flag(
        "key-bits",
        None,
        "bits of each element of a key, kept on the device, by which the selector codes scores pages; 0: none "
        "(default: 2, or 0 with another selector)",
        int,
        choices=KEY_BITS,
    )
    refetch: bool = _flag(
        "refetch", False, "fetch every selected page in every step, resident or not: slow, for comparison", bool
    )
    audit: bool = _flag("audit", False, "check every resident block and window after each step (slow)", bool)
    debug_dump: str | None = _flag(
        "debug-dump",
        None,
        f'folder for dumps of the windows of requests that ask for it with custom_params {{"{DUMP_PARAM}": true}}, or '
        "N for every N-th step (default: no dumps)",
        str,
        metavar="DIR",
    )
    page_size: int = 32  # tokens; SGLang's --page-size

    def __post_init__(self) -> None:
        is_page_size = is_int(self.page_size) and self.page_size in PAGE_SIZES
        _require(is_page_size, "--page-size", self.page_size, "tokens, " + _or(PAGE_SIZES))
        if self.max_budget_tokens is None:
            object.__setattr__(self, "max_budget_tokens", self.budget_tokens)
        for name in ("budget_tokens", "max_budget_tokens", "sink_tokens", "recent_tokens", "arena_tokens"):
            self._check_tokens(name)
        one_page = f"at least one page ({self.page_size} tokens)"
        _require(self.recent_tokens >= self.page_size, "--freekv-recent", self.recent_tokens, one_page)
        _require(self.arena_tokens >= self.page_size, "--freekv-arena", self.arena_tokens, one_page)
        fixed = self.sink_tokens + self.recent_tokens
        _require(
            fixed <= self.budget_tokens,
            "--freekv-budget",
            self.budget_tokens,
            f"at least sink + recent ({fixed} tokens)",
        )
        _require(
            self.budget_tokens <= self.max_budget_tokens,
            "--freekv-max-budget",
            self.max_budget_tokens,
            f"at least the budget ({self.budget_tokens} tokens)",
        )
        in_range = _is_number(self.tau) and -1 <= self.tau <= 2
        _require(in_range, "--freekv-tau", self.tau, "a number from -1 to 2")
        for name, gib in (
            ("--freekv-host-memory", self.host_memory_gib),
            ("--freekv-device-blocks-memory", self.device_blocks_memory_gib),
        ):
            is_size = gib is None or (_is_number(gib) and 0 < gib <= _MAX_GIB)
            _require(is_size, name, gib, f"GiB, more than 0 and at most {_MAX_GIB:,}")
        layers = self.dense_layers
        _require(
            isinstance(layers, tuple)
            and all(is_int(layer) and layer >= 0 for layer in layers)
            and len(set(layers)) == len(layers),
            "--freekv-dense-layers",
            layers,
            'distinct layer numbers from 0, for example "0,1"',
        )
        is_pooling = self.group_pooling in GROUP_POOLINGS
        _require(is_pooling, "--freekv-group-pooling", self.group_pooling, _or(GROUP_POOLINGS))
        _require(self.selector in (None, *SELECTORS), "--freekv-selector", self.selector, _or(SELECTORS))
        if self.key_bits is None:
            object.__setattr__(self, "key_bits", 2 if self.selector in (None, "codes") else 0)
        is_known = is_int(self.key_bits) and self.key_bits in KEY_BITS
        _require(is_known, "--freekv-key-bits", self.key_bits, _or(KEY_BITS))
        if self.selector is not None:
            fits = (self.key_bits > 0) == (self.selector == "codes")
            needs = f"{_or(KEY_BITS[1:])} with" if self.selector == "codes" else "0 with"
            _require(fits, "--freekv-key-bits", self.key_bits, f"{needs} --freekv-selector {self.selector}")
        for name in ("refetch", "audit"):
            _require(isinstance(getattr(self, name), bool), f"--freekv-{name}", getattr(self, name), "True or False")
        is_folder = self.debug_dump is None or (isinstance(self.debug_dump, str) and self.debug_dump != "")
        _require(is_folder, "--freekv-debug-dump", self.debug_dump, "the path of a folder")

    def _check_tokens(self, name: str) -> None:
        tokens = getattr(self, name)
        flag = f"--freekv-{flags()[name].metadata['flag']}"
        whole_pages = is_int(tokens) and tokens >= 0 and tokens % self.page_size == 0
        _require(whole_pages, flag, tokens, f"tokens, a multiple of the page size ({self.page_size})")

    def keywords(self) -> dict[str, Any]:
        """The settings as `sgl.Engine` takes them, and as JSON shows them."""
        values = {OPTION_PREFIX + f.metadata["flag"].replace("-", "_"): getattr(self, n) for n, f in flags().items()}
        as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return as_json | {"page_size": self.page_size}

    @property
    def selector_name(self) -> str:
        """The selector, also where none was asked for."""
        return self.selector or ("codes" if self.key_bits else "min-max")

    @property
    def budget_pages(self) -> int:
        return self.budget_tokens // self.page_size

    @property
    def max_budget_pages(self) -> int:
        """Width of a window."""
        return self.max_budget_tokens // self.page_size

    @property
    def sink_pages(self) -> int:
        return self.sink_tokens // self.page_size

    @property
    def recent_pages(self) -> int:
        return self.recent_tokens // self.page_size

    @property
    def arena_pages(self) -> int:
        return self.arena_tokens // self.page_size


def flags() -> dict[str, Field]:
    return {f.name: f for f in fields(FreeKVConfig) if "flag" in f.metadata}


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _or(values: Iterable[Any]) -> str:
    """List the choices: "16, 32 or 64"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"


def _require(holds: bool, flag: str, given: Any, expected: str) -> None:
    if not holds:
        raise UnsupportedConfiguration(f"{flag} is {given!r}; give {expected}.")
