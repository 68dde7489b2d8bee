"""What is planned without having it: machines, models and contexts, and the tables of it. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.cost_model.machine import DESKTOP, H100_X8, Machine
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.planning import BUDGETS, Choice, K, best_freekv, best_plain
from benchmarks.cost_model.traffic import Traffic, measured_traffic
from sglang_freekv.config import FreeKVConfig

LLAMA, QWEN = Model.load("llama-3.1-8b"), Model.load("qwen3-32b")
LLAMA_FP8 = Model.load("llama-3.1-8b", weight_bits=8)
DEFAULT_BUDGET = FreeKVConfig.budget_tokens
BY_PAPERS_RULE = measured_traffic("freekv-paper", "rules_long")
_COLUMNS = ["budget", "requests", "why no more", "device GB/request", "host GB/request", "step ms", "nothing hidden"]


@dataclass(frozen=True)
class Plan:
    """A table: every model and context on one machine, plain SGLang against FreeKV."""

    machine: Machine
    models: tuple[tuple[Model, tuple[int | None, ...]], ...]  # with the GPUs of a replica; None: what is fastest
    contexts: tuple[int, ...]  # tokens
    traffic: Traffic = field(default_factory=measured_traffic)

    @property
    def assumptions(self) -> str:
        t, m = self.traffic, self.machine
        host = f"{m.host_gib:,.0f} GiB of host memory at {m.host_gbs:.0f} GB/s"
        gpus = (
            f"{m.gpus} x {m.device_gib:.0f} GiB at {m.memory_gbs:,.0f} GB/s, link {m.recall_gbs:.0f} GB/s each, {host}"
        )
        return (
            f"{gpus}. {m.source} Traffic that is put in, by default as measured with a small language model: "
            f"{_words(t)}; by the paper's rule {_words(BY_PAPERS_RULE)}."
        )

    def lines(self) -> list[list[str]]:
        lines = [["model", "context", "engine", "replicas x GPUs", *_COLUMNS, "tokens/s", "times plain"]]
        for model, layouts in self.models:
            for context in self.contexts:
                for tp in layouts:
                    lines += self._cell(model, context, tp)
        return lines

    def _cell(self, model: Model, context: int, tp: int | None) -> list[list[str]]:
        request = self.machine, model, context
        plain = best_plain(*request, tp)
        found = {
            "plain": plain,
            "freekv": best_freekv(*request, self.traffic, budget=DEFAULT_BUDGET, tp=tp),
            "freekv, best budget": best_freekv(*request, self.traffic, tp=tp),
            "freekv, paper's rule": best_freekv(*request, BY_PAPERS_RULE, "paper", DEFAULT_BUDGET, tp),
        }
        return [[_name(model), f"{context:,}", engine, *_cells(choice, plain)] for engine, choice in found.items()]


def _words(traffic: Traffic) -> str:
    return (
        f"one step changes {traffic.turnover:.1%} of the selected pages and corrects {traffic.flagged_share:.0%} of "
        f"the rows, recalls {traffic.missed_share:.2f} times what it would if windows returned to no page, and waits "
        f"for {traffic.exposed_share:.0%} of that"
    )


def _name(model: Model) -> str:
    return model.name if model.weight_bits == 16 else f"{model.name}, {model.weight_bits}-bit weights"


def _cells(choice: Choice | None, plain: Choice | None) -> list[str]:
    if choice is None:
        return ["does not fit", *[""] * (len(_COLUMNS) + 2)]
    s = choice.setting
    return [
        f"{choice.replicas} x {choice.tp}",
        "" if s.budget is None else f"{s.budget:,}",
        f"{choice.replicas} x {s.batch}",
        choice.limit if s.batch == choice.most_requests else f"no faster (up to {choice.most_requests} fit)",
        f"{choice.device_request_bytes / 1e9:.2f}",
        f"{choice.host_request_bytes / 1e9:.2f}" if s.budget else "",
        f"{choice.step_s * 1e3:.1f}",
        f"{choice.worst_step_s * 1e3:.1f}",
        f"{choice.throughput:,.0f}",
        "" if plain is None else f"{choice.throughput / plain.throughput:.2f}",
    ]


@dataclass(frozen=True)
class BudgetPlan(Plan):
    """A table: the best batch by budget and by the traffic that is assumed."""

    turnovers: tuple[float, ...] = (0.04, measured_traffic().turnover, 0.2)

    @property
    def assumptions(self) -> str:
        rule = "Bold: the largest budget within 10 % of the fastest of these; what a budget loses is not in the model."
        return f"{rule} {super().assumptions} The share of changing pages is that of the column here."

    def lines(self) -> list[list[str]]:
        pages = [f"{turnover:.1%} of pages change" for turnover in self.turnovers]
        lines = [["model", "context", "budget", *(f"requests, step ms, tokens/s: {share}" for share in pages)]]
        for model, layouts in self.models:
            for context in self.contexts:
                for tp in layouts:
                    lines += self._budgets(model, context, tp)
        return lines

    def _budgets(self, model: Model, context: int, tp: int | None) -> list[list[str]]:
        lines = [[_name(model), f"{context:,}", f"{budget:,}"] for budget in BUDGETS if budget < context]
        for turnover in self.turnovers:
            traffic = replace(self.traffic, turnover=turnover)
            best = best_freekv(self.machine, model, context, traffic, tp=tp)
            for line, budget in zip(lines, BUDGETS, strict=False):
                choice = best_freekv(self.machine, model, context, traffic, budget=budget, tp=tp)
                line.append(_short(choice, best))
        return lines


def _short(choice: Choice | None, best: Choice | None) -> str:
    if choice is None:
        return "does not fit"
    text = f"{choice.replicas * choice.setting.batch}, {choice.step_s * 1e3:.1f}, {choice.throughput:,.0f}"
    return f"**{text}**" if choice == best else text


PLANS: dict[str, Plan] = {
    "24gb": Plan(DESKTOP, ((LLAMA, (1,)), (LLAMA_FP8, (1,))), (32 * K, 128 * K, 1024 * K)),
    "24gb-budgets": BudgetPlan(DESKTOP, ((LLAMA, (1,)), (LLAMA_FP8, (1,))), (32 * K,)),
    "8gpus": Plan(H100_X8, ((LLAMA, (1,)), (QWEN, (2,))), (8 * K, 32 * K, 128 * K)),
    "8gpus-budgets": BudgetPlan(H100_X8, ((LLAMA, (1,)), (QWEN, (2,))), (128 * K,)),
    "1m": Plan(H100_X8, ((LLAMA, (1, 4, 8)), (QWEN, (4, 8))), (1024 * K,)),
}
