"""Print a report; exit with 1 where something would not work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from freekv_patches.patch import IncompatibleSGLang, check_version
from freekv_patches.registry import patch_status
from sglang_freekv.doctor import environment
from sglang_freekv.memory.pinned import GIB
from sglang_freekv.memory.units import in_words

_EPILOG = (
    "All other flags are those of the server: --freekv-budget, --tp-size, --mem-fraction-static and so on. Sizes are "
    "in GiB. Without --gpu-memory-gb the report is about this machine, with it about one that has such GPUs."
)


class Report:
    """Prints sections and collects what would not work."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def section(self, title: str, lines: list[str]) -> None:
        print("\n".join([title, *(f"  {line}" for line in lines)]))

    def problem(self, text: str) -> None:
        self.problems.append(text)


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 where something would not work."""
    own, flags = _parse(sys.argv[1:] if argv is None else argv)
    report = Report()
    report.section("Machine", environment.describe_machine())
    report.section("Packages", environment.describe_packages())
    if not _report_patches(report):
        report.section("Server", ["not checked: this is not the SGLang that FreeKV works with"])
    elif "--model-path" in {flag.partition("=")[0] for flag in flags} or "--model" in flags:
        _report_server(report, own, flags)
    else:
        report.section("Server", ["not checked: give --model-path"])
    verdict = ["nothing is in the way"] if not report.problems else [f"- {problem}" for problem in report.problems]
    report.section("Result", verdict)
    return 1 if report.problems else 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The doctor's own flags, and the rest."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_freekv.doctor",
        description="Would a server with KV retrieval start, and with what memory? Loads no model.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    for flag, text in {
        "--gpu-memory-gb": "memory of each GPU; default: of the GPU here, if any",
        "--host-memory-gb": "free CPU memory of the machine; default: what is free here",
        "--weights-gb": "weights of the whole model; default: from its files",
    }.items():
        parser.add_argument(flag, type=_gib, metavar="GIB", help=text)
    return parser.parse_known_args(argv)


def _gib(text: str) -> int:
    """Bytes of a positive number of GiB."""
    try:
        num_bytes = int(float(text) * GIB)
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give GiB, more than 0")
    return num_bytes


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
    model, text = server_args.get_model_config(), server_args.get_model_config().hf_text_config
    report.section(
        "Model",
        [
            f"{server_args.model_path}: {', '.join(model.hf_config.architectures or ['?'])}, {model.dtype}",
            f"{model.num_hidden_layers} layers, {text.num_attention_heads} query heads and "
            f"{model.get_total_num_kv_heads()} KV heads of {model.head_dim}, context {model.context_len:,} tokens",
        ],
    )
    found = _attempt(report, lambda: forecast(server_args, config, machine))
    settings = config.keywords() if found is None else found.plan.report()["config"]
    report.section("Settings", [f"{name:<28} {_shown(value)}" for name, value in settings.items()])
    if found is None:
        return
    where = "on the CPU" if server_args.device == "cpu" else f"on a GPU of {in_words(machine.total_gpu_bytes)}"
    report.section(
        f"Memory of each of {server_args.tp_size} rank(s), {where}",
        [
            f"weights           {in_words(found.weights_bytes):>10}",
            f"kept by SGLang    {in_words(found.reserve_bytes):>10}  activations and graphs: "
            f"1 - --mem-fraction-static ({server_args.mem_fraction_static})",
            *found.plan.describe().splitlines(),
        ],
    )
    if found.plan.max_input_tokens < model.context_len:
        report.section(
            "Note",
            [
                f"prompts of more than {found.plan.max_input_tokens:,} tokens will be refused, though the model takes "
                f"{model.context_len:,}: the host store holds no more"
            ],
        )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attempt(report: Report, step: Callable):
    """What the step returns; None where it is refused, which is noted."""
    try:
        return step()
    except (ValueError, OSError) as error:  # what SGLang, transformers and FreeKV refuse with
        report.problem(" ".join(str(error).split()))
    except SystemExit:
        report.problem("SGLang does not take these flags; its message is above")
    return None


if __name__ == "__main__":
    sys.exit(main())
