"""Faults of device blocks, windows and what a step reads."""

from __future__ import annotations

import sys

from pytest import MonkeyPatch

from freekv_kernels import Half
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.memory.budgets import Budgets
from sglang_freekv.memory.device_blocks import DeviceBlocks
from tools.fuzz.planting import fault, faults_in, wrap, wrap_op

# Blocks


@fault("differs from host page|wrong output of a decode step")
def a_decoded_token_does_not_reach_its_block(patch: MonkeyPatch) -> None:
    def append(original, q, k, v, batch, tau, store, *rest):
        original(q, k, v, batch, tau, store._replace(block_kv=store.block_kv.clone()), *rest)

    wrap_op(patch, "append_tokens", append)


@fault("differs from host page|wrong output of a decode step")
def a_recall_copies_the_other_head(patch: MonkeyPatch) -> None:
    def recall(original, store, *rest):
        original(store._replace(host_kv=store.host_kv.flip(1).contiguous()), *rest)

    wrap(patch, sys.modules["freekv_kernels.fetch_blocks"], "recall_blocks", recall)


@fault("disagree")
def an_evicted_block_keeps_its_row_of_the_block_table(patch: MonkeyPatch) -> None:
    def claim(original, pairs, blocks, *stamps):
        before = blocks.table.clone()
        claimed = original(pairs, blocks, *stamps)
        blocks.table.copy_(blocks.table.where(blocks.table >= 0, before))
        return claimed

    wrap(patch, sys.modules["freekv_kernels.claim_blocks"], "_claim", claim)


@fault("disagree|not either free or owned")
def two_requests_claim_the_same_free_block(patch: MonkeyPatch) -> None:
    def claim(original, pairs, blocks, *stamps):
        before = blocks.num_free.clone()
        claimed = original(pairs, blocks, *stamps)
        blocks.num_free.copy_(before)
        return claimed

    wrap(patch, sys.modules["freekv_kernels.claim_blocks"], "_claim", claim)


@fault("not either free or owned")
def a_forgotten_block_is_lost(patch: MonkeyPatch) -> None:
    def forget(original, pairs, blocks):
        before = blocks.num_free.clone()
        original(pairs, blocks)
        blocks.num_free.copy_(before)

    wrap_op(patch, "forget_blocks", forget)


@fault("lost their blocks|has no block|without a block|wrong output of a decode step")
def a_claim_takes_blocks_of_windows(patch: MonkeyPatch) -> None:
    def claim(original, pairs, blocks, protect_from, *rest):
        return original(pairs, blocks, 1 << 31, *rest)

    wrap(patch, sys.modules["freekv_kernels.claim_blocks"], "_claim", claim)


@fault("lost their blocks|has no block|without a block|wrong output of a decode step")
def a_window_does_not_stamp_its_blocks(patch: MonkeyPatch) -> None:
    def lookup(original, windows, batch, half, blocks, *rest, **kwargs):
        before = blocks.last_used.clone()
        original(windows, batch, half, blocks, *rest, **kwargs)
        blocks.last_used.copy_(before)

    wrap(patch, sys.modules["freekv_kernels.fetch_blocks"], "lookup_blocks", lookup)


@fault("has no block|without a block|wrong output of a decode step", setup="stamps end, scored at intervals")
def stamps_that_ended_are_never_old(patch: MonkeyPatch) -> None:
    def advance(self, number):
        self.step.fill_(2) if number == 1 << 29 else self.step.add_(1)

    patch.setattr(DeviceBlocks, "advance", advance)


# Windows and what a step reads


@fault("not what q selects|is not of the expected form|worse by|instead of")
def a_row_that_is_scored_keeps_its_window(patch: MonkeyPatch) -> None:
    def correct(original, scores, queries, store, batch, *rest):
        original(scores, queries, store, batch, *rest)
        (front,), (back,) = (half.indices(int(batch.step)) for half in (Half.FRONT, Half.BACK))
        windows = rest[5]
        windows[back] = windows[front]

    wrap_op(patch, "correct_windows", correct)


@fault("wrong output|wrong window|is not of the expected form|not what q selects|index|pages instead of")
def a_row_keeps_the_budget_of_its_last_owner(patch: MonkeyPatch) -> None:
    def admit(original, self, row, *asked):
        if not hasattr(self, "seen"):
            self.seen = set()
        if row not in self.seen:
            original(self, row, *asked)
        self.seen.add(row)

    wrap(patch, Budgets, "admit", admit)


@fault("worse by|not of the expected form")
def the_first_window_is_chosen_by_another_row_s_query(patch: MonkeyPatch) -> None:
    def score(original, last_q, summary, batch, half, *rest):
        return original(last_q.roll(1, 0) if half == Half.BOTH else last_q, summary, batch, half, *rest)

    wrap_op(patch, "score_pages", score)


@fault("wrong output|has no block|without a block|differs")
def a_step_reads_the_request_table_when_it_runs(patch: MonkeyPatch) -> None:
    """Not when it was planned; what finished meanwhile has given its row to another request."""

    def plan(original, self, step, *rest):
        self.live_table = step.req_to_token
        return original(self, step, *rest)

    def run(original, self, *args):
        batch, page_size = self.last_plan.batch, self.memory.geometry.page_size
        width = batch.page_table.shape[1] * page_size
        batch.page_table.copy_(self.live_table[batch.rows, :width:page_size] // page_size)
        return original(self, *args)

    wrap(patch, Decode, "plan", plan)
    wrap(patch, Decode, "run", run)


@fault("wrong output of a prefill")
def prefill_reads_its_prefix_from_other_pages(patch: MonkeyPatch) -> None:
    def fill(original, arena, store, pages):
        original(arena, store, pages.roll(1))

    wrap_op(patch, "fill_arena", fill)


FAULTS = faults_in(globals())
