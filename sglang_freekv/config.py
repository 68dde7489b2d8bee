"""FreeKV's settings: one frozen dataclass, whose fields are the command line flags and `sgl.Engine` keywords.

Imports the standard library only: spawned processes unpickle it before SGLang has loaded its plug-ins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from reprlib import repr as shorten
from typing import Any, Literal

METHOD_OPTION = "kv_retrieval"
OPTION_PREFIX = "freekv_"
BUDGET_PARAM, DUMP_PARAM = "freekv_budget", "freekv_dump"  # keys of a request's `custom_params`
PAGE_SIZES = (16, 32, 64)
KEY_BITS = (0, 1, 2, 4)
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
    key_bits: int = _flag(
        "key-bits",
        2,
        "bits of each element of a key, kept on the device, by which pages are scored; 0: by the minimum and maximum "
        "of a page",
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
        is_page_size = _is_int(self.page_size) and self.page_size in PAGE_SIZES
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
            and all(_is_int(layer) and layer >= 0 for layer in layers)
            and len(set(layers)) == len(layers),
            "--freekv-dense-layers",
            layers,
            'distinct layer numbers from 0, for example "0,1"',
        )
        is_pooling = self.group_pooling in GROUP_POOLINGS
        _require(is_pooling, "--freekv-group-pooling", self.group_pooling, _or(GROUP_POOLINGS))
        is_known = _is_int(self.key_bits) and self.key_bits in KEY_BITS
        _require(is_known, "--freekv-key-bits", self.key_bits, _or(KEY_BITS))
        for name in ("refetch", "audit"):
            _require(isinstance(getattr(self, name), bool), f"--freekv-{name}", getattr(self, name), "True or False")
        is_folder = self.debug_dump is None or (isinstance(self.debug_dump, str) and self.debug_dump != "")
        _require(is_folder, "--freekv-debug-dump", self.debug_dump, "the path of a folder")

    def _check_tokens(self, name: str) -> None:
        tokens = getattr(self, name)
        flag = f"--freekv-{_flags()[name].metadata['flag']}"
        whole_pages = _is_int(tokens) and tokens >= 0 and tokens % self.page_size == 0
        _require(whole_pages, flag, tokens, f"tokens, a multiple of the page size ({self.page_size})")

    def keywords(self) -> dict[str, Any]:
        """The settings as `sgl.Engine` takes them, and as JSON shows them."""
        values = {OPTION_PREFIX + f.metadata["flag"].replace("-", "_"): getattr(self, n) for n, f in _flags().items()}
        as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return as_json | {"page_size": self.page_size}

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

    def request_budget_tokens(self, custom_params: Mapping[str, Any] | None) -> int:
        """Resolve a request's budget in tokens.

        Parameters
        ----------
        custom_params : mapping or None
            SGLang's sampling parameter of that name. ``{"freekv_budget": N}`` asks for N tokens.

        Raises
        ------
        ValueError
            If N does not fit, or another key starts with "freekv_".
        """
        if custom_params is None:
            return self.budget_tokens
        if not isinstance(custom_params, Mapping):
            raise ValueError(f'custom_params is {shorten(custom_params)}; give {{"{BUDGET_PARAM}": tokens}}.')
        for key in custom_params:
            if str(key).startswith(OPTION_PREFIX) and key not in (BUDGET_PARAM, DUMP_PARAM):
                raise ValueError(f"custom_params has the unknown key {shorten(key)}; did you mean {BUDGET_PARAM!r}?")
        tokens = custom_params.get(BUDGET_PARAM, self.budget_tokens)
        fixed = self.sink_tokens + self.recent_tokens
        if not _is_int(tokens) or not fixed <= tokens <= self.max_budget_tokens or tokens % self.page_size:
            raise ValueError(
                f"custom_params.{BUDGET_PARAM} is {shorten(tokens)}; give tokens, a multiple of {self.page_size}, "
                f"at least {fixed} (sink + recent), at most {self.max_budget_tokens} (--freekv-max-budget)."
            )
        return tokens

    def request_dump_interval(self, custom_params: Mapping[str, Any] | None) -> int | None:
        """Every how many decode steps a request's windows are dumped; None: never.

        Raises
        ------
        ValueError
            If ``custom_params["freekv_dump"]`` is no such number, or the server has no folder for it.
        """
        every = (custom_params or {}).get(DUMP_PARAM, False)
        if every is False:
            return None
        if every is not True and not (_is_int(every) and every > 0):
            raise ValueError(f"custom_params.{DUMP_PARAM} is {shorten(every)}; give true, or a number of steps from 1.")
        if self.debug_dump is None:
            raise ValueError(f"custom_params.{DUMP_PARAM} needs a server started with --freekv-debug-dump DIR.")
        return int(every)


def check_custom_params_fit(custom_params: Mapping[str, Any] | None) -> None:
    """Refuse what SGLang 0.5.17 does not carry to its scheduler, which ends where it cannot read a message.

    Raises
    ------
    ValueError
        If a value, of anybody's key, is neither plain nor a list or a mapping of plain ones.
    """
    for key, value in (custom_params or {}).items():
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, (bool, int, float, str)) for part in parts):
            raise ValueError(
                f"custom_params.{shorten(key)} is {shorten(value)}; give a number, a text, true, false, null, or a "
                "list or an object of those."
            )


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add ``--kv-retrieval`` and the ``--freekv-*`` flags. A flag that is not given parses to None."""
    group = parser.add_argument_group("KV retrieval")
    group.add_argument(
        "--kv-retrieval",
        choices=("none", "freekv"),
        help="freekv: a window of each request's KV on the device, all of it in CPU memory (default: none)",
    )
    for flag in _flags().values():
        meta = flag.metadata
        text = meta["help"] if "(default" in meta["help"] else f"{meta['help']} (default: {flag.default})"
        # A switch has no value to parse; its default says "not given", as with the other flags.
        kind = {"action": "store_true"} if meta["parse"] is bool else {"type": meta["parse"]} | meta["values"]
        group.add_argument(f"--freekv-{meta['flag']}", default=None, help=text.replace("%", "%%"), **kind)


def take_options(options: Mapping[str, Any]) -> tuple[FreeKVConfig | None, dict[str, Any]]:
    """Split FreeKV's options, by keyword names, from SGLang's.

    Returns
    -------
    config : FreeKVConfig or None
        None where ``kv_retrieval`` is not "freekv".
    rest : dict
        The options that are SGLang's. Its ``page_size`` is among them, and in the config where it is set.

    Raises
    ------
    UnsupportedConfiguration
        If a value is refused, or FreeKV's options are given without ``kv_retrieval="freekv"``.
    """
    keywords = {OPTION_PREFIX + f.metadata["flag"].replace("-", "_"): f for f in _flags().values()}
    rest = {name: value for name, value in options.items() if name != METHOD_OPTION and name not in keywords}
    method = options.get(METHOD_OPTION)
    given = {name: options[name] for name in keywords if options.get(name) is not None}
    if method not in (None, "none", "freekv"):
        raise UnsupportedConfiguration(f"--kv-retrieval is {method!r}; give none or freekv.")
    if method != "freekv":
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise UnsupportedConfiguration(f"{flag} has no effect without --kv-retrieval freekv; add it.")
        return None, rest
    settings = {keywords[name].name: _parse(keywords[name], value) for name, value in given.items()}
    if (page_size := options.get("page_size")) is not None:
        settings["page_size"] = page_size
    return FreeKVConfig(**settings), rest


def _parse(flag: Field, value: Any) -> Any:
    """Accept what the command line gives, and from Python also its text form or a list; the config checks the rest."""
    parse = flag.metadata["parse"]
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, Iterable) else value
    try:
        return value if parse is bool else parse(value)
    except ValueError:
        raise UnsupportedConfiguration(
            f"--freekv-{flag.metadata['flag']} is {value!r}; give {flag.metadata['help']}."
        ) from None


def _flags() -> dict[str, Field]:
    return {f.name: f for f in fields(FreeKVConfig) if "flag" in f.metadata}


def _is_int(value: Any) -> bool:
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
