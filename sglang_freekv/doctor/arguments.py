"""The command line: the doctor's own flags, then the server's, with a word on what is misspelt."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.flags import add_cli_args
from sglang_freekv.memory.units import GIB
from sglang_freekv.releases import release

_EPILOG = (
    "All other flags are those of the server: --freekv-budget, --tp-size, --mem-fraction-static and so on. Sizes are "
    "in GiB. Without --gpu-memory-gb the report is about this machine, with it about one that has such GPUs. A "
    "config.json is enough of a model: the size of its weights is then estimated, or said with --weights-gb."
)
_CONFIG_FILE = "--config"


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing hundreds of lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise UnsupportedConfiguration(f"{message}.")


def own_parser() -> argparse.ArgumentParser:
    """Of what the server does not have."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_freekv.doctor",
        description="Would a server with KV retrieval start, with what memory, and for how many requests? Loads no "
        "model.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    sizes = {
        "--gpu-memory-gb": "memory of each GPU; default: of the GPU here, if any",
        "--host-memory-gb": "free CPU memory of the machine; default: what is free here",
        "--weights-gb": "weights of the whole model; default: from its files, or, where it has none, an estimate from "
        "its config.json, which is made for "
        "Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE; needed for others",
    }
    for flag, text in sizes.items():
        parser.add_argument(flag, type=_gib, metavar="GIB", help=text)
    parser.add_argument(
        "--request-tokens",
        type=_tokens,
        metavar="TOKENS",
        help="length of a request, answer included, for which the report counts how many fit; default: 32768, or the "
        "model's context",
    )
    return parser


def server_arguments(flags: list[str]) -> dict[str, Any]:
    """What the server's parser makes of its flags, `kv_retrieval` among them; `model_path` may be None.

    Raises
    ------
    UnsupportedConfiguration
        If a flag or a value is not taken; suggests the flag that is spelt most like it.
    """
    from sglang.srt.server_args import ServerArgs

    # Where the plug-in is active, SGLang adds our flags itself.
    parser = _Parser(prog="doctor", add_help=False, conflict_handler="resolve")
    ServerArgs.add_cli_args(parser)
    add_cli_args(parser)
    for action in parser._actions:
        action.required = False
    if _CONFIG_FILE in flags:
        flags = release.merge_config_file(parser, flags)
    arguments, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [*parser._option_string_actions, *own_parser()._option_string_actions]
        raise UnsupportedConfiguration(_unknown(unknown, known))
    return vars(arguments)


def _unknown(words: list[str], known: list[str]) -> str:
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return f"{words[0]!r} belongs to no flag; take it away, or put the flag before it."
    near = difflib.get_close_matches(flags[0], [flag for flag in known if flag.startswith("--")], n=1)
    hint = f"did you mean {near[0]}?" if near else "see python -m sglang.launch_server --help."
    return f"{flags[0]} is no flag of the server; {hint}"


def _gib(text: str) -> int:
    """Bytes of a positive number of GiB."""
    try:
        num_bytes = int(float(text) * GIB)
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give GiB, more than 0")
    return num_bytes


def _tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; give tokens, 1 or more")
    return int(text)
