"""Which model, GPU and context want which flags: the doctor's counts for a few cards, as docs/which_flags.md.

python -m benchmarks.which_flags            print it
python -m benchmarks.which_flags --write    write docs/which_flags.md
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cost_model.model import MODELS
from benchmarks.records import ROOT
from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.doctor.benefit import Benefit, benefit_of
from sglang_freekv.doctor.forecast import Machine, forecast, resolve
from sglang_freekv.memory.units import GIB

PATH = ROOT / "docs" / "which_flags.md"
_TEXT = """# Which flags for which model, GPU and context

How many requests of one length fit at the same time, answer included, by `python -m sglang_freekv.doctor`: counted
from the sizes of model, card and CPU memory. **Nothing here was measured, and none of it has run on a GPU yet**; of
speed and of answers the table says nothing. `defaults` is `--kv-retrieval freekv` alone, `at most` the host store of
the last column, which is sized for requests of this length; `from` is the context from which on more requests fit than
in plain SGLang with the same flags.

{table}

A row is the report of

    python -m sglang_freekv.doctor --model-path FOLDER --gpu-memory-gb CARD --host-memory-gb CPU \\
        --tp-size GPUS --request-tokens LENGTH

where FOLDER has the model's `config.json` (those of the table: `benchmarks/cost_model/models`), and SGLang's own flags
are added where the last column has them. `--freekv-host-memory` is per GPU. In CPU memory a token takes what it takes
in plain SGLang on the GPU, so little CPU memory bounds the requests, too. `--freekv-budget 1024` halves the windows of
a request, and what it sees. Of 8 GiB SGLang itself keeps 45 % free for activations and graphs; 20 % may do for a small
model, which nobody has tried here. On 24 GiB SGLang 0.5.23 prefills 4,096 tokens at a time unless it is told otherwise,
and keeps 28 % free for that; with 2,048, the default of 0.5.17, it keeps 15 %.

`python -m benchmarks.which_flags --write` makes this file.
"""
_HEADER = ("card", "CPU", "model", "GPUs", "length", "plain SGLang", "defaults", "at most", "from", "flags")


@dataclass(frozen=True)
class Case:
    """One row. GiB, and tokens."""

    gpu_gib: int
    host_gib: int
    model: str  # of benchmarks/cost_model/models
    length: int
    tp_size: int = 1
    flags: tuple[str, ...] = ()


_ROOMY = ("--mem-fraction-static", "0.8")
_SMALL_CHUNKS = ("--chunked-prefill-size", "2048")
CASES = (
    Case(8, 32, "qwen2.5-1.5b", 32768),
    Case(8, 32, "qwen2.5-1.5b", 32768, flags=_ROOMY),
    Case(8, 32, "smollm2-1.7b", 8192, flags=_ROOMY),
    Case(8, 32, "llama-3.1-8b", 8192),
    Case(24, 64, "llama-3.1-8b", 8192, flags=_SMALL_CHUNKS),
    Case(24, 64, "llama-3.1-8b", 32768, flags=_SMALL_CHUNKS),
    Case(24, 64, "llama-3.1-8b", 131072, flags=_SMALL_CHUNKS),
    Case(80, 256, "llama-3.1-8b", 4096),
    Case(80, 256, "llama-3.1-8b", 32768),
    Case(80, 256, "llama-3.1-8b", 131072),
    Case(80, 256, "qwen3-32b", 32768),
    Case(80, 512, "qwen3-32b", 32768, tp_size=2),
    Case(80, 1024, "llama-3.1-70b", 131072, tp_size=4),
)


def benefit(case: Case) -> Benefit | str:
    """The doctor's counts, or why the server would not start."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((MODELS / f"{case.model}.json").read_text())
        machine = Machine(case.gpu_gib * GIB, case.host_gib * GIB)
        try:
            server_args, config = resolve(
                ["--model-path", folder, "--tp-size", str(case.tp_size), *case.flags], machine
            )
            return benefit_of(forecast(server_args, config, machine), case.length)
        except UnsupportedConfiguration as error:
            return str(error)


def row(case: Case) -> list[str]:
    found = benefit(case)
    known = [f"{case.gpu_gib} GiB", f"{case.host_gib:,} GiB", case.model, str(case.tp_size), f"{case.length:,}"]
    if isinstance(found, str):
        return [*known, "", "", "", "", f"does not start. {found}"]
    asked = found.asked
    flags = [*case.flags, "--kv-retrieval freekv"]
    if found.has_better_store:
        flags.append(f"--freekv-host-memory {asked.best.host_memory_gib:g}")
    advice = f"`{' '.join(flags)}`" if asked.best.num_requests > asked.plain else "plain SGLang holds no fewer"
    counts = [f"{number:,}" for number in (asked.plain, asked.planned, asked.best.num_requests)]
    return [*known, *counts, "-" if found.gains_above is None else f"{found.gains_above:,}", advice]


def render() -> str:
    """The whole file."""
    rows = [_HEADER, ["---"] * len(_HEADER), *map(row, CASES)]
    return _TEXT.format(table="\n".join(f"| {' | '.join(cells)} |" for cells in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PATH.relative_to(ROOT)}")
    if parser.parse_args().write:
        PATH.write_text(render())
    else:
        print(render())


if __name__ == "__main__":
    main()
