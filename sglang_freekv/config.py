"""FreeKV's settings: one frozen dataclass, whose fields are the command line flags and `sgl.Engine` keywords.

Imports the standard library only: spawned processes unpickle it before SGLang has loaded its plug-ins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from sglang_freekv.checks import FOLDER, GIB, LAYERS, SWITCH, Check, between, is_int, layer_numbers, listed, one_of

METHOD_OPTION = "kv_retrieval"
OPTION_PREFIX = "freekv_"
# Keys of a request's `custom_params`.
BUDGET_PARAM, MASS_PARAM, DUMP_PARAM = "freekv_budget", "freekv_mass", "freekv_dump"
PAGE_SIZES = (16, 32, 64)
KEY_BITS = (0, 1, 2, 4)
BASELINES = ("streaming-llm", "one-time", "r-kv", "corm", "arkvale")  # selectors of others, to compare with
BY_CODES = ("mass", "codes")  # selectors that score pages by their keys in a few bits
SELECTORS = ("mass", "codes", "min-max", "paper", *BASELINES)
GROUP_POOLINGS = ("softmax", "scaled", "max", "mean")
_DEFAULT_POOLING = "softmax"  # the paper's
_DEFAULT_KEY_BITS = 2  # of these
_DEFAULT_TAU, _PAPER_TAU, _DEFAULT_GATE = 0.9, 0.8, 0.02
_DEFAULT_HYSTERESIS = 1.0


class UnsupportedConfiguration(ValueError):
    """A setting, or a combination with SGLang's settings or the model, that FreeKV cannot serve."""


def _flag(
    name: str, default: Any, help: str, parse: Callable[[str], Any] = int, check: Check | None = None, **values: Any
) -> Any:
    """Declare a field that users set with ``--freekv-<name>`` or the keyword ``freekv_<name>``.

    `check` is asked of every value but None, where that is the default; without one, values are tokens, which are
    checked against the page size. `values` describes them for argparse: what they are called, or the choices.
    """
    metadata = {
        "flag": name,
        "help": help,
        "parse": parse,
        "check": check,
        "values": values or {"metavar": "TOKENS"},
    }
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
    mass: float | None = _flag(
        "mass",
        None,
        "estimated share of its attention, 0 to 1, that a KV head's window is to hold in each step: heads that need "
        "less read less, others more, and the heads of a request together at most its budget each; 0: all heads read "
        f'the budget, unless a request asks for a share with custom_params {{"{MASS_PARAM}": SHARE}}; only with the '
        "selector mass (default: all heads read the budget, and no request may ask)",
        float,
        between(0, 1),
        metavar="SHARE",
    )
    sink_tokens: int = _flag("sink", 128, "tokens at the start of the prompt that are always attended to")
    recent_tokens: int = _flag("recent", 128, "latest tokens that are always attended to, at least one page")
    tau: float | None = _flag(
        "tau",
        None,
        "cosine similarity of two steps' queries below which a KV head selects again at once, -1 to 2; "
        f"above 1: in every step (exact), -1: never (speculation only) (default: {_DEFAULT_TAU} without a gate)",
        float,
        between(-1, 2),
        metavar="COSINE",
    )
    gate: float | None = _flag(
        "gate",
        None,
        "estimated share of its attention, 0 to 1, that a KV head's window may lack before the head selects again at "
        f"once; only with the selector mass, and instead of --freekv-tau (default: {_DEFAULT_GATE} with mass)",
        float,
        between(0, 1),
        metavar="SHARE",
    )
    host_memory_gib: float | None = _flag(
        "host-memory",
        None,
        "GiB of CPU memory for the complete KV (default: what is free less a margin)",
        float,
        GIB,
        metavar="GIB",
    )
    device_blocks_memory_gib: float | None = _flag(
        "device-blocks-memory",
        None,
        "GiB of device memory for the resident KV (default: what is left)",
        float,
        GIB,
        metavar="GIB",
    )
    windows: float = _flag(
        "windows",
        2.0,
        "windows of device blocks planned for each running request, 2 to 4: more recall less, and fewer requests run",
        float,
        between(2, 4),
        metavar="WINDOWS",
    )
    arena_tokens: int = _flag("arena", 32768, "tokens of prefix that prefill lays out at a time, per layer")
    dense_layers: tuple[int, ...] = _flag(
        "dense-layers",
        (),
        'layers that attend to every token, for example "0,1" (default: none)',
        layer_numbers,
        LAYERS,
        metavar="LAYERS",
    )
    group_pooling: Literal["softmax", "scaled", "max", "mean"] | None = _flag(
        "group-pooling",
        None,
        "how the query heads of a KV head agree on a page, but for the selector mass, where it is the mean of their "
        "shares: mean of their softmaxed scores, mean or maximum of those of scores scaled as in attention (scaled, "
        f"max), or mean of raw scores (default: {_DEFAULT_POOLING})",
        str,
        one_of(GROUP_POOLINGS),
        choices=GROUP_POOLINGS,
    )
    selector: str | None = _flag(
        "selector",
        None,
        "what pages are chosen by: their share of the attention, by their keys in a few bits (mass), their largest "
        "logit by these (codes), or a bound on it, by the minimum and maximum of their keys (min-max; paper: with the "
        f"paper's tau, {_PAPER_TAU}); the others are baselines, for comparison (default: mass, or min-max with "
        "--freekv-key-bits 0)",
        str,
        one_of(SELECTORS),
        choices=SELECTORS,
    )
    hysteresis: float | None = _flag(
        "hysteresis",
        None,
        "nats by which another page must score better than one of the present window to take its place, 0 to 20 "
        f"(default: {_DEFAULT_HYSTERESIS} with the selector mass, else 0)",
        float,
        between(0, 20),
        metavar="NATS",
    )
    score_interval: int = _flag(
        "score-interval",
        1,
        "steps, 1 to 64, after which the pages of a row are scored again at the latest: while its window lacks no more "
        "than half of the gate, the steps from one scoring to the next double up to this, and it is not corrected "
        "between them; above 1 only with a gate, and neither with --freekv-mass nor with --freekv-candidates",
        int,
        Check(lambda value: is_int(value) and 1 <= value <= 64, "1 to 64"),
        metavar="STEPS",
    )
    candidates: int = _flag(
        "candidates",
        0,
        "pages that are scored by their keys for each page that is selected, 2 to 1000, only with the selector mass: "
        "those of the groups of pages whose bounds promise most; 0: every page",
        int,
        Check(lambda value: is_int(value) and (value == 0 or 2 <= value <= 1000), "0, or 2 to 1000"),
        metavar="TIMES",
    )
    # After construction an int: None means what the selector needs.
    key_bits: int | None = _flag(
        "key-bits",
        None,
        "bits of each element of a key, kept on the device, by which the selectors mass and codes score pages; 0: none "
        "(default: 2, or 0 with another selector)",
        int,
        one_of(KEY_BITS),
        choices=KEY_BITS,
    )
    refetch: bool = _flag(
        "refetch",
        False,
        "fetch every selected page in every step, resident or not: slow, for comparison",
        bool,
        SWITCH,
    )
    audit: bool = _flag("audit", False, "check every resident block and window after each step (slow)", bool, SWITCH)
    debug_dump: str | None = _flag(
        "debug-dump",
        None,
        f'folder for dumps of the windows of requests that ask for it with custom_params {{"{DUMP_PARAM}": true}}, or '
        "N for every N-th step (default: no dumps)",
        str,
        FOLDER,
        metavar="DIR",
    )
    page_size: int = 32  # tokens; SGLang's --page-size

    def __post_init__(self) -> None:
        self._resolve()
        sizes = one_of(PAGE_SIZES)
        _require(sizes.holds(self.page_size), "--page-size", self.page_size, "tokens, " + sizes.expected)
        tokens = f"tokens, a multiple of the page size ({self.page_size})"
        whole_pages = Check(lambda value: is_int(value) and value >= 0 and value % self.page_size == 0, tokens)
        for name, flag in flags().items():
            value, check = getattr(self, name), flag.metadata["check"] or whole_pages
            is_default = value is None and flag.default is None
            _require(is_default or check.holds(value), f"--freekv-{flag.metadata['flag']}", value, check.expected)
        self._check_relations()

    def _resolve(self) -> None:
        """Fill in what follows from other settings."""
        if self.max_budget_tokens is None:
            object.__setattr__(self, "max_budget_tokens", self.budget_tokens)
        if self.key_bits is None:
            object.__setattr__(self, "key_bits", _DEFAULT_KEY_BITS if self.selector in (None, *BY_CODES) else 0)

    def _check_relations(self) -> None:
        """What settings that are right one by one must be together."""
        one_page = f"at least one page ({self.page_size} tokens)"
        _require(self.recent_tokens >= self.page_size, "--freekv-recent", self.recent_tokens, one_page)
        _require(self.arena_tokens >= self.page_size, "--freekv-arena", self.arena_tokens, one_page)
        fixed, budget = self.sink_tokens + self.recent_tokens, self.budget_tokens
        _require(fixed <= budget, "--freekv-budget", budget, f"at least sink + recent ({fixed} tokens)")
        most = self.max_budget_tokens
        _require(budget <= most, "--freekv-max-budget", most, f"at least the budget ({budget} tokens)")
        none = f"0 with --freekv-selector {self.selector}, which keeps pages by its own rule"
        _require(self.selector not in BASELINES or not self.hysteresis, "--freekv-hysteresis", self.hysteresis, none)
        one = "--freekv-gate or --freekv-tau, and not both"
        _require(self.gate is None or self.tau is None, "--freekv-gate", self.gate, one)
        by_mass = "it with --freekv-selector mass only, or --freekv-tau"
        _require(self.gate is None or self.selector_name == "mass", "--freekv-gate", self.gate, by_mass)
        more = f"none with a budget of just sink + recent ({fixed} tokens), or a larger budget"
        _require(self.mass is None or most > fixed, "--freekv-mass", self.mass, more)
        none = "0 with another selector than mass"
        _require(not self.candidates or self.selector_name == "mass", "--freekv-candidates", self.candidates, none)
        no_choice = "none with the selector mass, or --freekv-selector codes"
        by_shares = self.selector_name == "mass"
        _require(not by_shares or self.group_pooling is None, "--freekv-group-pooling", self.group_pooling, no_choice)
        by_shares = "it with --freekv-selector mass only, or leave it out"
        _require(self.mass is None or self.selector_name == "mass", "--freekv-mass", self.mass, by_shares)
        paced = "1 with --freekv-tau, --freekv-mass, --freekv-candidates or another selector than mass"
        # Nothing but the gate may do without the scores of a step.
        can_wait = self.max_lost_share is not None and self.mass is None and not self.candidates
        _require(can_wait or self.score_interval == 1, "--freekv-score-interval", self.score_interval, paced)
        if self.selector is not None:
            reads_codes = self.selector in BY_CODES
            fits, bits = (self.key_bits > 0) == reads_codes, listed(KEY_BITS[1:]) if reads_codes else "0"
            _require(fits, "--freekv-key-bits", self.key_bits, f"{bits} with --freekv-selector {self.selector}")

    def keywords(self) -> dict[str, Any]:
        """The settings as `sgl.Engine` takes them, and as JSON shows them; defaults of the rule are filled in."""
        rule = {
            "selector": self.selector_name,
            "tau": self.min_cosine,
            "gate": self.max_lost_share,
            "group_pooling": None if self.selector_name == "mass" else self.pooling,
            "hysteresis": self.bonus,
        }
        fields = {name: rule.get(name, getattr(self, name)) for name in flags()}
        values = {OPTION_PREFIX + flags()[n].metadata["flag"].replace("-", "_"): v for n, v in fields.items()}
        as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return as_json | {"page_size": self.page_size}

    @property
    def max_lost_share(self) -> float | None:
        """Share of the attention beyond which a row selects again; None: it does where `min_cosine` says so."""
        if self.selector_name != "mass" or self.tau is not None:
            return None
        return _DEFAULT_GATE if self.gate is None else self.gate

    @property
    def min_cosine(self) -> float | None:
        """Cosine of two steps' queries below which a row selects again; None: by `max_lost_share`."""
        if self.max_lost_share is not None:
            return None
        default = _PAPER_TAU if self.selector == "paper" else _DEFAULT_TAU
        return default if self.tau is None else self.tau

    @property
    def bonus(self) -> float:
        """Nats that a page of the present window scores more."""
        default = _DEFAULT_HYSTERESIS if self.selector_name == "mass" else 0.0
        return default if self.hysteresis is None else self.hysteresis

    @property
    def pooling(self) -> str:
        """Of the group, where the selector does not pool it."""
        return self.group_pooling or _DEFAULT_POOLING

    @property
    def selector_name(self) -> str:
        """The selector, also where none was asked for."""
        return self.selector or ("mass" if self.key_bits else "min-max")


def flags() -> dict[str, Field]:
    return {f.name: f for f in fields(FreeKVConfig) if "flag" in f.metadata}


def _require(holds: bool, flag: str, given: Any, expected: str) -> None:
    if not holds:
        raise UnsupportedConfiguration(f"{flag} is {given!r}; give {expected}.")
