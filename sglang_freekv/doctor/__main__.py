"""Print a report; exit with 1 where something would not work."""

from __future__ import annotations

import argparse
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from freekv_patches.patch import IncompatibleSGLang, check_version
from freekv_patches.registry import patch_status
from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.doctor import environment
from sglang_freekv.doctor.arguments import own_parser, server_arguments
from sglang_freekv.doctor.tested import was_run
from sglang_freekv.memory.units import in_words
from sglang_freekv.releases import release

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_freekv.config import FreeKVConfig
    from sglang_freekv.doctor.forecast import Forecast, Machine


class Report:
    """Prints sections and collects what would not work, and what nobody knows to work."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.untested: list[str] = []

    def section(self, title: str, lines: list[str]) -> None:
        print("\n".join([title, *(f"  {line}" for line in lines)]))

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def verdict(self) -> list[str]:
        if self.problems:
            return [f"- {problem}" for problem in self.problems]
        return self.untested or ["nothing is in the way"]


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 where something would not work."""
    own, flags = own_parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    report = Report()
    report.section("Machine", environment.describe_machine())
    report.section("Packages", environment.describe_packages())
    if not _report_patches(report):
        report.section("Server", ["not checked: this is not the SGLang that FreeKV works with"])
    elif (arguments := _attempt(report, lambda: server_arguments(flags))) is not None:
        if arguments["model_path"] is None:
            report.section("Server", ["not checked: give --model-path"])
        else:
            _report_server(report, own, flags)
    report.section("Result", report.verdict())
    return 1 if report.problems else 0


def _report_patches(report: Report) -> bool:
    """Whether SGLang is the release that the rest of the report can be about."""
    is_tested = True
    try:
        check_version()
    except IncompatibleSGLang as error:
        is_tested = False
        report.problem(str(error))
    number, mismatches = patch_status()
    report.section("Patches", [f"{number - len(mismatches)} of {number} targets fit this SGLang", *mismatches])
    for mismatch in mismatches:
        report.problem(f"a patch does not fit: {mismatch}")
    return is_tested


def _report_server(report: Report, own: argparse.Namespace, flags: list[str]) -> None:
    """Resolve the flags, then plan the memory; the first refusal ends it, as it would end the start."""
    from sglang_freekv.doctor.forecast import Machine, forecast, resolve

    machine = Machine(own.gpu_memory_gb, own.host_memory_gb, own.weights_gb)
    if (resolved := _attempt(report, lambda: resolve(flags, machine))) is None:
        return
    server_args, config = resolved
    if not _report_model(report, server_args):
        return
    found = _attempt(report, lambda: forecast(server_args, config, machine))
    _report_settings(report, config, found)
    if found is None:
        return
    _report_memory(report, server_args, machine, found)
    _report_benefit(report, server_args, found, flags, own.request_tokens)


def _report_model(report: Report, server_args: ServerArgs) -> bool:
    """Describe the model and whether its class was ever run; False where SGLang has none for it."""
    from sglang_freekv.doctor.forecast import class_of

    model = release.model_of(server_args)
    text = model.hf_text_config
    if (name := _attempt(report, lambda: class_of(model))) is None:
        return False
    report.section(
        "Model",
        [
            f"{server_args.model_path}: {name}, {model.dtype}",
            f"{model.num_hidden_layers} layers, {text.num_attention_heads} query heads and "
            f"{model.get_total_num_kv_heads()} KV heads of {model.head_dim}, context {model.context_len:,} tokens",
        ],
    )
    if not was_run(name):
        report.untested.append(f"not tested: no model of {name} was ever run with KV retrieval; no refusal is known")
    elif not was_run(name, server_args.device):
        report.section("Note", [f"{name} was run with KV retrieval, but not yet on {server_args.device}"])
    if model.num_attention_heads % server_args.tp_size:  # refused on a GPU
        report.untested.append(f"not tested: {model.num_attention_heads} heads, padded for {server_args.tp_size} ranks")
    return True


def _report_settings(report: Report, config: FreeKVConfig, found: Forecast | None) -> None:
    settings = config.keywords() if found is None else found.plan.report()["config"]
    report.section("Settings", [f"{name:<28} {_shown(value)}" for name, value in settings.items()])


def _report_memory(report: Report, server_args: ServerArgs, machine: Machine, found: Forecast) -> None:
    where = "on the CPU" if server_args.device == "cpu" else f"on a GPU of {in_words(machine.total_gpu_bytes)}"
    report.section(
        f"Memory of each of {server_args.tp_size} rank(s), {where}",
        [
            f"weights           {in_words(found.weights_bytes):>10}  {found.weights.source}",
            f"kept by SGLang    {in_words(found.reserve_bytes):>10}  activations and graphs: "
            f"1 - --mem-fraction-static ({server_args.mem_fraction_static})",
            *found.plan.describe().splitlines(),
        ],
    )
    context_len = found.model.context_len
    if found.plan.max_input_tokens < context_len:
        report.section(
            "Note",
            [
                f"prompts of more than {found.plan.max_input_tokens:,} tokens will be refused, though the model takes "
                f"{context_len:,}: the host store holds no more"
            ],
        )


def _report_benefit(
    report: Report, server_args: ServerArgs, found: Forecast, flags: list[str], request_tokens: int | None
) -> None:
    from sglang_freekv.doctor.benefit import benefit_of, command_line, describe

    benefit = None
    if server_args.device == "cpu":
        lines = ["on a CPU plain SGLang keeps its KV in the same memory: retrieval makes no room for more requests"]
    else:
        benefit = benefit_of(found, request_tokens)
        lines = describe(benefit, found.model.context_len)
    report.section("Beside plain SGLang", lines)
    report.section("Command", [command_line(flags, benefit)])


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempt(report: Report, step: Callable):
    """What the step returns; None where it is refused, or ends in any other error, which is noted as one line."""
    try:
        return step()
    except SystemExit:
        report.problem("SGLang does not take these flags; its message is above")
    except UnsupportedConfiguration as error:
        report.problem(str(error))
    except Exception as error:
        report.problem(_sentence(error))
    return None


def _sentence(error: Exception) -> str:
    """One line on an error of SGLang, or of what it uses."""
    text = textwrap.shorten(str(error), 400)
    asked = "" if torch.cuda.is_available() else " (asked on a machine without a GPU)"
    if isinstance(error, (ValueError, OSError)) and text:  # what they refuse with
        return f"SGLang refuses it{asked}: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
    return f"SGLang ends with {where}{asked}{f': {text}' if text else ''}"


if __name__ == "__main__":
    sys.exit(main())
