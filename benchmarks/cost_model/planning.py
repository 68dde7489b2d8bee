"""What fits a machine, and which budget and batch serve a context fastest there. All of it is prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.cost_model.machine import Machine
from benchmarks.cost_model.model import Model
from benchmarks.cost_model.step_time import Setting, geometry_of, step_seconds
from benchmarks.cost_model.traffic import Traffic
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.doctor.capacity import Rank, best_fit, pages_of, plan_for_requests
from sglang_freekv.memory.plan import MemoryPlan
from sglang_freekv.memory.units import GIB
from sglang_freekv.serving.pool_sizes import attention_bytes, whole_lines

K = 1024
# Smaller ones would be faster still, and nobody has measured what they lose.
BUDGETS = (1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K)
_MOST_REQUESTS = 4096  # per replica; SGLang's own bound is of this size
# A smaller batch with nearly the throughput answers sooner; a larger budget with nearly the throughput sees more.
_BATCH_TOLERANCE, _BUDGET_TOLERANCE = 0.05, 0.1


@dataclass(frozen=True)
class Choice:
    """One way to serve requests of one length on a machine, with the step that is predicted for it."""

    setting: Setting  # of one replica
    tp: int  # GPUs of a replica
    replicas: int  # behind a router, each with requests of its own
    step_s: float
    worst_step_s: float  # as if every recall were waited for
    most_requests: int  # of a replica, that fit
    limit: str  # what the next request would not fit
    device_request_bytes: int  # of one more request, on all GPUs of a replica
    host_request_bytes: int
    host_store_gib: float  # of a replica's rank, for --freekv-host-memory; 0: plain SGLang

    @property
    def throughput(self) -> float:
        """Tokens per second of the whole machine."""
        return self.replicas * self.setting.batch / self.step_s


def rank_of(machine: Machine, model: Model, setting: Setting, tp: int) -> Rank:
    """One of `tp` ranks, as the doctor sees it: what fits is asked of the same plan that a server makes."""
    g = geometry_of(model, setting, tp=tp)
    longest = max(model.max_context, setting.context)
    return Rank(
        geometry=g,
        plain_token_bytes=g.token_bytes * model.head_dim // g.head_dim,
        device_bytes=machine.device_bytes(model.weight_bytes // tp),
        host_bytes=machine.host_bytes(),
        max_requests=_MOST_REQUESTS,
        max_context=whole_lines(longest + 1, g.page_size),
        attention_bytes=attention_bytes(g, machine.num_sms),
    )


def plan_freekv(machine: Machine, model: Model, setting: Setting, tp: int) -> MemoryPlan | str:
    """The memory of a rank that holds the requests of `setting`, or what they do not fit."""
    rank = rank_of(machine, model, setting, tp)
    return plan_for_requests(rank, setting.config, setting.context, setting.batch)


def plain_misfit(machine: Machine, model: Model, setting: Setting, tp: int) -> str | None:
    """What the requests of `setting` do not fit in plain SGLang; None if they do."""
    fitting = rank_of(machine, model, setting, tp).plain_requests(setting.context)
    return None if setting.batch <= fitting else "device memory"


def best_plain(machine: Machine, model: Model, context: int, tp: int | None = None) -> Choice | None:
    """The fastest plain SGLang; None where not one request fits. `tp`: as for `best_freekv`."""
    found = []
    for ranks in _ranks(machine, model, tp):
        rank = rank_of(machine, model, Setting(context, 1), ranks)
        most = rank.plain_requests(context)
        limit = "device memory" if most < _MOST_REQUESTS else "SGLang's --max-running-requests"
        request_bytes = ranks * context * rank.plain_token_bytes
        for batch in _batches(most):
            setting = Setting(context, batch)
            found.append(_choice(machine, model, setting, ranks, most, limit, request_bytes, 0, 0.0))
    return _smallest_batch(found)


def best_freekv(
    machine: Machine,
    model: Model,
    context: int,
    traffic: Traffic,
    selector: str | None = None,
    budget: int | None = None,
    tp: int | None = None,
) -> Choice | None:
    """The fastest FreeKV, or None if not one request fits.

    Parameters
    ----------
    context : int
        Tokens of a request, answer included.
    budget : int, optional
        By default the largest of `BUDGETS` that is nearly as fast as any: what a budget loses is not in the model.
    tp : int, optional
        GPUs of a replica; by default what is fastest.
    """
    per_budget = []
    for tokens in (budget,) if budget else [b for b in BUDGETS if b < context]:
        choices = []
        for ranks in _ranks(machine, model, tp):
            one = Setting(context, 1, FreeKVConfig(budget_tokens=tokens, selector=selector))
            choices += _of_budget(machine, model, one, ranks, traffic)
        if best := _smallest_batch(choices):
            per_budget.append(best)
    fastest = max((choice.throughput for choice in per_budget), default=0)
    near = [choice for choice in per_budget if choice.throughput >= (1 - _BUDGET_TOLERANCE) * fastest]
    return max(near, key=lambda choice: choice.setting.budget, default=None)


def _of_budget(machine: Machine, model: Model, one: Setting, tp: int, traffic: Traffic) -> Iterator[Choice]:
    fit = best_fit(rank_of(machine, model, one, tp), one.config, one.context)
    for batch in _batches(fit.num_requests):
        setting = replace(one, batch=batch, flagged_share=traffic.flagged_share, exposed_share=traffic.exposed_share)
        plan = plan_freekv(machine, model, setting, tp)
        g = plan.geometry
        setting = replace(setting, recalled_bytes=recalled_bytes(plan, setting, traffic) * tp)
        device = plan.request_bytes + pages_of(setting.context, g) * (plan.summaries_bytes // (plan.num_pages + 1))
        host = pages_of(setting.context, g) * g.page_bytes
        store = plan.host_bytes / GIB
        yield _choice(machine, model, setting, tp, fit.num_requests, fit.limit, tp * device, tp * host, store)


def recalled_bytes(plan: MemoryPlan, setting: Setting, traffic: Traffic) -> float:
    """Of one request, step and rank: pages that enter a window, as far as they are not resident.

    How much more often such a page is resident than any page of the running requests is the traffic's to say.
    """
    g = plan.geometry
    resident = min(1.0, plan.num_blocks / (setting.batch * pages_of(setting.context, g) * g.num_kv_heads))
    return traffic.recalled_bytes(resident, setting.selected * g.token_bytes)


def _choice(
    machine: Machine,
    model: Model,
    setting: Setting,
    tp: int,
    most: int,
    limit: str,
    device_request_bytes: int,
    host_request_bytes: int,
    host_store_gib: float,
) -> Choice:
    return Choice(
        setting=setting,
        tp=tp,
        replicas=machine.gpus // tp,
        step_s=step_seconds(machine, model, setting, tp),
        worst_step_s=step_seconds(machine, model, setting, tp, is_worst=True),
        most_requests=most,
        limit=limit,
        device_request_bytes=device_request_bytes,
        host_request_bytes=host_request_bytes,
        host_store_gib=host_store_gib,
    )


def _ranks(machine: Machine, model: Model, wanted: int | None) -> list[int]:
    """Numbers of GPUs that a replica may have."""
    known = [tp for tp in (1, 2, 4, 8) if tp <= machine.gpus and model.kv_heads % tp == 0]
    return [tp for tp in known if wanted in (None, tp)]


def _batches(most: int) -> list[int]:
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


def _smallest_batch(choices: list[Choice]) -> Choice | None:
    """The smallest batch per machine that is nearly as fast as any."""
    fastest = max((choice.throughput for choice in choices), default=0)
    near = [choice for choice in choices if choice.throughput >= (1 - _BATCH_TOLERANCE) * fastest]
    return min(near, key=lambda choice: (choice.setting.batch * choice.replicas, choice.step_s), default=None)
