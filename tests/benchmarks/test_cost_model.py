"""The cost model counts what is read, plans what fits, finds known prices again, and says what is predicted."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.cost_model import report
from benchmarks.cost_model.cells import CPU_SHAPE, cells
from benchmarks.cost_model.fit import Sample, describe_machine, errors_of
from benchmarks.cost_model.machine import DESKTOP, H100_X8, Kernels, Machine
from benchmarks.cost_model.model import MODELS, Model
from benchmarks.cost_model.picture import draw
from benchmarks.cost_model.planning import (
    BUDGETS,
    K,
    best_freekv,
    best_plain,
    plain_misfit,
    plan_freekv,
    recalled_bytes,
)
from benchmarks.cost_model.plans import PLANS, Plan
from benchmarks.cost_model.results import read_run, write_run
from benchmarks.cost_model.step_time import Setting, step_seconds, work_of
from benchmarks.cost_model.traffic import measured_traffic
from benchmarks.records import RecordWriter, read_records
from benchmarks.tables.marked import fill
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.page_indexes import INDEXES
from sglang_freekv.memory.plan import MemoryPlan

LLAMA, QWEN = Model.load("llama-3.1-8b"), Model.load("qwen3-32b")
CONFIG = FreeKVConfig(budget_tokens=2 * K)
OVER = Setting(32 * K, 8, CONFIG, flagged_share=0.5, recalled_bytes=1e6, exposed_share=0.25)
NEVER, ALWAYS = (replace(OVER, config=replace(CONFIG, tau=tau)) for tau in (-1, 2))
RATES = {"memory_gbs": 8.0, "link_gbs": 3.0, "flops": 5e10}
SIZES = {"device_gib": 24.0, "host_gib": 24.0}
KNOWN = Machine(
    name="known",
    host_gbs=float("inf"),
    plain=Kernels(0.0, 4e-4, 1e-4, 2.0),
    freekv=Kernels(0.0, 9e-4, 2e-4, 3.0, 5e-5, 0.4),
    source="",
    overlaps=False,
    **SIZES,
    **RATES,
)
SMALL = Model.of_shape(CPU_SHAPE)
TRAFFIC = measured_traffic()


def samples(machine: Machine = KNOWN) -> list[Sample]:
    """What the measured cells would take on a machine."""
    found = []
    for cell in (*cells("plain", "cpu"), *cells("freekv", "cpu")):
        sample = Sample(cell, 0, 0, 0, flagged=0.5, recalled_bytes=2e4 if cell.windows else 0.0)
        seconds = step_seconds(machine, SMALL, sample.setting)
        found.append(replace(sample, seconds=seconds, p20=seconds, p80=seconds))
    return found


@pytest.fixture
def records(tmp_path: Path) -> list:
    writer = RecordWriter("cost_model", tmp_path / "cost_model.jsonl")
    write_run(writer, RATES, [asdict(sample) for sample in samples()], "cpu", 24.0)
    return read_records(writer.path)


class TestModel:
    def test_parameters_are_those_of_the_published_checkpoints(self):
        assert LLAMA.params == 8_030_261_248
        assert QWEN.params == 32_762_123_264

    def test_a_rank_has_its_share_of_the_kv(self):
        whole, rank = (LLAMA.geometry(32, 2, tp=tp) for tp in (1, 4))
        assert whole.token_bytes == 128 * 1024
        assert rank.token_bytes * 4 == whole.token_bytes

    @pytest.mark.parametrize(("change", "message"), [({"num_experts": 8}, "num_experts is 8"), ({}, "no vocab_size")])
    def test_what_it_does_not_know_is_refused(self, change, message):
        config = json.loads((MODELS / "llama-3.1-8b.json").read_text()) | change
        if not change:
            del config["vocab_size"]
        with pytest.raises(ValueError, match=message):
            Model.from_config(config, "odd")

    def test_an_unknown_name_is_answered_with_the_known_ones(self):
        with pytest.raises(ValueError, match=r"give one of llama-3.1-70b, llama-3.1-8b, qwen2.5-1.5b, qwen3-32b, "):
            Model.load("gpt-5")


class TestStep:
    def test_within_the_budget_nothing_is_scored_or_recalled(self):
        within, plain = (work_of(LLAMA, replace(OVER, context=2 * K, config=c)) for c in (CONFIG, None))
        assert (within.scoring_bytes, within.selections, within.hidden_bytes, within.exposed_bytes) == (0, 0, 0, 0)
        assert within == plain

    def test_over_the_budget_only_scores_grow_with_the_context(self):
        every_page = replace(OVER, config=replace(CONFIG, candidates=0))
        short, long = (work_of(LLAMA, replace(every_page, context=n)) for n in (32 * K, 64 * K))
        assert long.scoring_bytes == 2 * short.scoring_bytes
        assert replace(long, scoring_bytes=short.scoring_bytes) == short

    def test_a_pass_over_every_page_reads_its_whole_index(self):
        every_page = replace(OVER, config=replace(CONFIG, candidates=0))
        page_bytes = INDEXES["mass"].page_bytes(LLAMA.geometry(32, 2))
        assert work_of(LLAMA, every_page).scoring_bytes == 8 * K * page_bytes

    def test_candidates_are_read_once_however_long_the_request_and_group_bounds_with_its_length(self):
        two_levels = replace(OVER, config=replace(CONFIG, candidates=5))
        medium, long, longest = (
            work_of(LLAMA, replace(two_levels, context=n * K)).scoring_bytes for n in (64, 96, 128)
        )
        every_page = replace(OVER, config=replace(CONFIG, candidates=0), context=128 * K)
        assert longest - long == long - medium == 8 * (32 * K // 128) * 32 * 8 * 2 * 128
        assert longest < work_of(LLAMA, every_page).scoring_bytes / 5

    def test_the_gate_reads_what_the_next_step_needs_and_nothing_more(self):
        gate, tau = OVER, replace(OVER, config=replace(CONFIG, tau=0.9))
        once = work_of(LLAMA, NEVER).scoring_bytes
        assert work_of(LLAMA, gate).scoring_bytes == once
        assert work_of(LLAMA, tau).scoring_bytes == 1.5 * once
        assert work_of(LLAMA, tau, device="cpu").scoring_bytes == once

    def test_what_is_waited_for_is_the_measured_share_and_not_that_of_the_corrected_rows(self):
        work = work_of(LLAMA, OVER)
        assert (work.exposed_bytes, work.hidden_bytes) == (2e6, 6e6)

    def test_every_corrected_row_is_scored_twice_and_waited_for(self):
        never, always = (work_of(LLAMA, setting) for setting in (NEVER, ALWAYS))
        assert always.scoring_bytes == 2 * never.scoring_bytes
        assert (never.exposed_bytes, always.hidden_bytes) == (0, 0)
        assert never.hidden_bytes == always.exposed_bytes == 8e6

    def test_recalls_hide_behind_the_step_and_those_of_the_last_layer_behind_the_logits(self):
        quiet, some = (replace(NEVER, recalled_bytes=n) for n in (0, 1e6))
        link = 8 * 1e6 / (DESKTOP.recall_gbs * 1e9)
        assert step_seconds(DESKTOP, LLAMA, some) == step_seconds(DESKTOP, LLAMA, quiet)
        worst = step_seconds(DESKTOP, LLAMA, some, is_worst=True)
        assert worst == pytest.approx(step_seconds(DESKTOP, LLAMA, quiet) + link)
        on_cpu = replace(DESKTOP, overlaps=False)
        assert step_seconds(on_cpu, LLAMA, some) == pytest.approx(worst)

    def test_what_the_last_layer_recalls_longer_than_the_logits_take_is_waited_for(self):
        flood = replace(NEVER, recalled_bytes=4e8)
        link = 8 * 4e8 / (DESKTOP.recall_gbs * 1e9)
        tail = link / LLAMA.layers - LLAMA.logits_params * 2 / (DESKTOP.memory_gbs * 1e9)
        assert tail > 0
        assert step_seconds(DESKTOP, LLAMA, flood) == pytest.approx(link + tail)

    def test_no_step_is_shorter_than_its_recalls(self):
        flood = replace(NEVER, recalled_bytes=1e9)
        assert step_seconds(DESKTOP, LLAMA, flood) >= 8e9 / (DESKTOP.recall_gbs * 1e9)

    def test_gpus_share_the_bandwidth_of_the_host(self):
        assert replace(H100_X8, host_gbs=80.0).recall_gbs == 10.0


class TestPlanning:
    @pytest.mark.parametrize(("machine", "tp"), [(DESKTOP, 1), (H100_X8, 2)])
    @pytest.mark.parametrize("selector", [None, "paper"])
    def test_the_most_requests_fit_and_one_more_does_not(self, machine, tp, selector):
        choice = best_freekv(machine, LLAMA, 32 * K, TRAFFIC, selector, 2 * K, tp)
        most = replace(choice.setting, batch=choice.most_requests)
        plan = plan_freekv(machine, LLAMA, most, tp)
        pools = plan.device_blocks_bytes + plan.summaries_bytes + plan.arena_bytes
        pools += plan.windows_bytes + plan.workspace_bytes
        assert pools <= machine.device_bytes(LLAMA.weight_bytes // tp)
        assert plan.max_requests >= most.batch
        assert plan.num_tokens >= most.batch * (32 * K + 1)
        assert plan.host_bytes <= machine.host_bytes()
        assert plan_freekv(machine, LLAMA, replace(most, batch=most.batch + 1), tp) == choice.limit

    def test_plain_fits_as_many_tokens_as_the_device_has_bytes(self):
        choice = best_plain(H100_X8, LLAMA, 32 * K, 1)
        free = H100_X8.device_bytes(LLAMA.weight_bytes)
        assert choice.most_requests == free // ((32 * K + 32) * 128 * 1024)
        assert plain_misfit(H100_X8, LLAMA, Setting(32 * K, choice.most_requests + 1), 1) == "device memory"

    def test_what_does_not_fit_has_no_choice(self):
        assert best_plain(DESKTOP, QWEN, 8 * K) is None
        assert best_freekv(DESKTOP, QWEN, 8 * K, TRAFFIC) is None

    @pytest.mark.parametrize(
        "traffic", [TRAFFIC, replace(TRAFFIC, flagged_share=0.1), replace(TRAFFIC, turnover=0.4)], ids=str
    )
    def test_no_batch_of_a_budget_is_much_faster_than_the_chosen_one(self, traffic):
        choice = best_freekv(DESKTOP, LLAMA, 32 * K, traffic, budget=2 * K)
        assert choice.setting.batch <= choice.most_requests
        for batch in range(1, choice.most_requests + 1):
            setting = replace(choice.setting, batch=batch)
            recalled = recalled_bytes(plan_freekv(DESKTOP, LLAMA, setting, 1), setting, traffic)
            throughput = batch / step_seconds(DESKTOP, LLAMA, replace(setting, recalled_bytes=recalled))
            assert choice.throughput >= 0.9 * throughput

    def test_no_batch_is_much_faster_than_the_chosen_one_even_if_it_recalled_nothing(self):
        choice = best_freekv(DESKTOP, LLAMA, 32 * K, replace(TRAFFIC, flagged_share=0.1), budget=2 * K)
        quiet = replace(choice.setting, recalled_bytes=0.0)  # an upper bound of what any batch could do
        for batch in range(1, choice.most_requests + 1):
            throughput = batch / step_seconds(DESKTOP, LLAMA, replace(quiet, batch=batch))
            assert choice.throughput >= 0.9 * throughput

    def test_the_best_budget_is_the_largest_that_is_nearly_as_fast(self):
        machine, context = replace(H100_X8, host_gib=128), 128 * K  # few requests, whatever their budget
        speeds = {b: best_freekv(machine, LLAMA, context, TRAFFIC, budget=b, tp=8).throughput for b in BUDGETS}
        chosen = best_freekv(machine, LLAMA, context, TRAFFIC, tp=8).setting.budget
        near = [budget for budget, speed in speeds.items() if speed >= 0.9 * max(speeds.values())]
        assert chosen == max(near) > min(BUDGETS)

    def test_nothing_is_recalled_where_everything_is_resident(self):
        small = best_freekv(H100_X8, LLAMA, 4 * K, TRAFFIC, budget=2 * K, tp=8)
        short = replace(small.setting, batch=1)
        assert isinstance(plan_freekv(H100_X8, LLAMA, short, 8), MemoryPlan)
        assert (
            best_freekv(replace(H100_X8, host_gib=8), LLAMA, 4 * K, TRAFFIC, budget=2 * K).setting.recalled_bytes == 0
        )


class TestFit:
    def test_known_prices_are_found_again(self):
        machine = describe_machine("fitted", SIZES, RATES, samples(), SMALL, is_gpu=False)
        for engine in ("plain", "freekv"):
            expected, found = (asdict(getattr(m, engine)) for m in (KNOWN, machine))
            assert found == pytest.approx(expected, rel=1e-3)

    def test_only_calibrating_steps_are_used(self):
        spoiled = [s if s.cell.calibrates else replace(s, seconds=9 * s.seconds) for s in samples()]
        machine = describe_machine("fitted", SIZES, RATES, spoiled, SMALL, is_gpu=False)
        others = [s for s in spoiled if not s.cell.calibrates]
        errors = errors_of(machine, SMALL, others)
        assert (errors.count, errors.median) == (len(others), pytest.approx(8 / 9, rel=1e-3))

    def test_no_byte_is_read_faster_than_memory(self):
        fast = replace(KNOWN, plain=replace(KNOWN.plain, attention_gbs=100.0))
        machine = describe_machine("fitted", SIZES, RATES, samples(fast), SMALL, is_gpu=False)
        assert machine.plain.attention_gbs <= RATES["memory_gbs"] * 1.001

    def test_too_few_steps_are_refused(self):
        with pytest.raises(ValueError, match="2 calibrating steps of plain for 3 prices"):
            describe_machine("fitted", SIZES, RATES, samples()[:2], SMALL, is_gpu=False)


class TestReport:
    def test_what_was_measured_is_read_back(self, records):
        run = read_run(records)
        assert [s.cell for s in run.samples] == [s.cell for s in samples()]
        assert [s.seconds for s in run.samples] == pytest.approx([s.seconds for s in samples()])
        assert [s.recalled_bytes for s in run.samples] == [s.recalled_bytes for s in samples()]
        assert errors_of(run.machine, run.model, run.samples).largest < 1e-3

    def test_records_hold_measurements_only(self, records):
        assert {r.metric for r in records} == {
            "memory_rate",
            "matmul_rate",
            "recall_rate",
            "device_memory",
            "decode_step",
        }

    def test_predictions_stand_beside_measurements_with_their_error(self, records):
        lines = report.table(records, "steps").markdown().splitlines()
        header = [cell.strip() for cell in lines[0].split("|")]
        assert {"measured ms", "predicted ms", "predicted / measured", "used to calibrate"} <= set(header)
        assert sum("did not calibrate: median error 0%, largest 0%" in line for line in lines) == 2

    def test_a_plan_says_that_it_is_a_prediction(self):
        text = str(report.plan_table(Plan(DESKTOP, ((LLAMA, (1,)),), (128 * K,))))
        assert "| llama-3.1-8b | 131,072 | plain | does not fit |" in text
        assert "\nPredictions, nothing is measured. 1 x 24 GiB" in text
        assert "It leaves out prefill" in text

    def test_marked_tables_are_filled(self, tmp_path):
        text = "<!-- cost_model cost_model steps -->\nold\n<!-- end -->\n"
        filled = fill(text, {"cost_model": report.table}, tmp_path)
        assert filled == text.replace("old", "No records yet.")
        with pytest.raises(ValueError, match=r"no table 'speed'; there are rates, steps, errors, " + ", ".join(PLANS)):
            report.table([], "speed")

    def test_a_picture_is_drawn(self, records, tmp_path):
        draw(read_run(records), tmp_path / "cost_model.png")
        assert (tmp_path / "cost_model.png").stat().st_size > 10_000
