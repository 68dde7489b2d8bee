"""The settings as command line flags and as `sgl.Engine` keywords."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import Field
from typing import Any

from sglang_freekv.config import METHOD_OPTION, OPTION_PREFIX, FreeKVConfig, UnsupportedConfiguration, flags


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add ``--kv-retrieval`` and the ``--freekv-*`` flags. A flag that is not given parses to None."""
    group = parser.add_argument_group("KV retrieval")
    group.add_argument(
        "--kv-retrieval",
        choices=("none", "freekv"),
        help="freekv: a window of each request's KV on the device, all of it in CPU memory (default: none)",
    )
    for flag in flags().values():
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
    keywords = {OPTION_PREFIX + f.metadata["flag"].replace("-", "_"): f for f in flags().values()}
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
