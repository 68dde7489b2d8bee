"""What a request asks for: the keys of its `custom_params` that are FreeKV's."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shorten
from typing import Any

from sglang_freekv.checks import is_int, is_share
from sglang_freekv.config import BUDGET_PARAM, DUMP_PARAM, MASS_PARAM, OPTION_PREFIX, FreeKVConfig


def request_budget_tokens(config: FreeKVConfig, custom_params: Mapping[str, Any] | None) -> int:
    """Resolve a request's budget in tokens.

    Parameters
    ----------
    config : FreeKVConfig
    custom_params : mapping or None
        SGLang's sampling parameter of that name. ``{"freekv_budget": N}`` asks for N tokens.

    Raises
    ------
    ValueError
        If N does not fit, or another key starts with "freekv_".
    """
    if custom_params is None:
        return config.budget_tokens
    if not isinstance(custom_params, Mapping):
        raise ValueError(f'custom_params is {shorten(custom_params)}; give {{"{BUDGET_PARAM}": tokens}}.')
    for key in custom_params:
        if str(key).startswith(OPTION_PREFIX) and key not in (BUDGET_PARAM, MASS_PARAM, DUMP_PARAM):
            raise ValueError(f"custom_params has the unknown key {shorten(key)}; did you mean {BUDGET_PARAM!r}?")
    tokens = custom_params.get(BUDGET_PARAM, config.budget_tokens)
    fixed = config.sink_tokens + config.recent_tokens
    if not is_int(tokens) or not fixed <= tokens <= config.max_budget_tokens or tokens % config.page_size:
        raise ValueError(
            f"custom_params.{BUDGET_PARAM} is {shorten(tokens)}; give tokens, a multiple of {config.page_size}, "
            f"at least {fixed} (sink + recent), at most {config.max_budget_tokens} (--freekv-max-budget)."
        )
    return tokens


def request_mass(config: FreeKVConfig, custom_params: Mapping[str, Any] | None) -> float:
    """Resolve the share of the attention that a request's budgets follow; 0: they are fixed.

    Raises
    ------
    ValueError
        If ``custom_params["freekv_mass"]`` is no share, or the server has fixed budgets.
    """
    default = float(config.mass or 0)
    if MASS_PARAM not in (custom_params or {}):
        return default
    mass = custom_params[MASS_PARAM]
    if not is_share(mass):
        raise ValueError(f"custom_params.{MASS_PARAM} is {shorten(mass)}; give a share from 0 to 1 (0: fixed budgets).")
    if config.mass is None and mass > 0:
        raise ValueError(
            f"custom_params.{MASS_PARAM} is {shorten(mass)}; give 0, or start the server with --freekv-mass, for which "
            f"0 is enough."
        )
    return float(mass)


def request_dump_interval(config: FreeKVConfig, custom_params: Mapping[str, Any] | None) -> int | None:
    """Every how many decode steps a request's windows are dumped; None: never.

    Raises
    ------
    ValueError
        If ``custom_params["freekv_dump"]`` is no such number, or the server has no folder for it.
    """
    every = (custom_params or {}).get(DUMP_PARAM, False)
    if every is False:
        return None
    if every is not True and not (is_int(every) and every > 0):
        raise ValueError(f"custom_params.{DUMP_PARAM} is {shorten(every)}; give true, or a number of steps from 1.")
    if config.debug_dump is None:
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
