"""SGLang's memory side without a server: its requests, pools and radix tree are real, only the scheduler is not.

The order of events is that of SGLang's overlap scheduler. A batch is planned and then runs when the device gets to it;
until then requests finish, are retracted, admitted and evicted. A batch has run before the next one is planned.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch, release_req
from sglang.srt.mem_cache.allocation import alloc_for_decode, alloc_for_extend
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_freekv.config import BUDGET_PARAM
from sglang_freekv.memory.geometry import num_pages_of
from tools.fuzz.accounting import longest_prefix
from tools.fuzz.batch import Batch, Member
from tools.fuzz.engine import Engine
from tools.fuzz.setups import MAX_TOKENS, PAGE_SIZE, Setup
from tools.fuzz.texts import Text

VOCABULARY = 1 << 31


@dataclass(eq=False)
class Life:
    """A request from its admission to its end."""

    req: Req
    text: Text
    budget_pages: int
    num_prompt: int  # tokens
    is_answered: bool = False  # the result of its prompt has reached the scheduler

    @property
    def length(self) -> int:
        """Tokens that have a slot in the host store, those of a batch in flight included."""
        return self.req.kv_committed_len

    @property
    def num_known(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.req.origin_input_ids) + len(self.req.output_ids)


class Scheduler(Engine):
    """Who runs, and on which pages. What happens next is up to the caller.

    Attributes
    ----------
    waiting, running : list of Life
    chunked : Life or None
        The one whose prompt is not complete, as in SGLang.
    in_flight : Batch or None
        Planned, and not run yet.
    on_batch : callable
        Told of every batch that has run.
    seen : Counter
        What happened by itself: tokens of prefix hits, requests that were given the tree's pages for their own.
    """

    def __init__(self, setup: Setup, server_args: ServerArgs) -> None:
        super().__init__(setup)
        self._server_args = server_args
        self.waiting: list[Life] = []
        self.running: list[Life] = []
        self.chunked: Life | None = None
        self.in_flight: Batch | None = None
        self.on_batch: Callable[[Batch], None] = lambda batch: None
        self.num_admitted = 0
        self.seen: Counter[str] = Counter()

    @property
    def active(self) -> list[Life]:
        """Requests that hold a row of the request table."""
        return self.running + ([self.chunked] if self.chunked else [])

    # The host: requests come and go

    def admit(self, text: Text, num_prompt: int, budget_tokens: int | None) -> None:
        """A request joins the queue; its text goes on where the prompt ends."""
        params = SamplingParams(custom_params=budget_tokens and {BUDGET_PARAM: budget_tokens})
        prompt = array("q", text.ids[:num_prompt])
        req = Req(str(self.num_admitted), "", prompt, params, vocab_size=VOCABULARY, extra_key=text.extra_key)
        budget_pages = (budget_tokens or self.setup.config.budget_tokens) // PAGE_SIZE
        self.waiting.append(Life(req, text, budget_pages, num_prompt))
        self.num_admitted += 1

    def finish(self, life: Life) -> None:
        """A running request ends, or is aborted: its full pages stay in the tree."""
        self.running.remove(life)
        release_kv_cache(life.req, self.tree)

    def abort(self, life: Life) -> None:
        """The client of a request goes away."""
        if life in self.waiting:
            self.waiting.remove(life)
        elif life is self.chunked:
            self.chunked = None
            release_kv_cache(life.req, self.tree, is_insert=False)
        else:
            self.finish(life)

    def retract(self, life: Life) -> None:
        """A running request gives its memory back and starts again, from its prompt and what it has generated."""
        self.running.remove(life)
        release_req(
            req=life.req,
            remaing_req_count=len(self.running),
            server_args=self._server_args,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            hisparse_coordinator=None,
        )
        life.num_prompt, life.is_answered = life.num_known, False
        self.waiting.insert(0, life)

    def evict(self, num_tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=num_tokens))

    def flush(self) -> None:
        """What SGLang does when it is idle and asked to forget."""
        assert not (self.waiting or self.active or self.in_flight), "SGLang refuses to flush while it serves"
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()

    # Batches

    def extend(self, num_tokens: int, overlap: bool) -> None:
        """Prefill up to `num_tokens`: the rest of a prompt that was cut, then new requests as far as they fit."""
        if self.in_flight and any(member.life in self.waiting for member in self.in_flight.members):
            self.settle()  # a retracted request comes back only after the batch that it was in
        self._stash_chunk()
        members, free_rows = [], self.rows.available_size()
        for life in [self.chunked, *self.waiting] if self.chunked else self.waiting:
            is_new = life is not self.chunked
            if num_tokens == 0 or (is_new and free_rows == 0):
                break
            self._find_prefix(life, is_new)
            first = len(life.req.prefix_indices)
            last = min(life.num_prompt, first + num_tokens)
            member = Member(life, first, last, is_answered=last == life.num_prompt)
            if not self._fits([*members, member]):
                if is_new:
                    self.tree.dec_lock_ref(life.req.last_node)
                break
            life.req.set_extend_range(first, last)
            members.append(member)
            free_rows -= is_new
            num_tokens -= last - first
        if members:
            self._launch_extend(members, overlap)

    def _find_prefix(self, life: Life, is_new: bool) -> None:
        """Find and lock what the tree has of a new request's prompt; its last token is always computed."""
        if not is_new:
            life.req.init_next_round_input()
            return
        life.req.init_next_round_input(self.tree)
        self.tree.inc_lock_ref(life.req.last_node)
        found, there = len(life.req.prefix_indices), longest_prefix(self.tree, life.text, life.num_prompt - 1)
        self.seen["hit_tokens"] += found
        assert found == there, f"tree: found {found} tokens of a prompt of which it has {there}"

    def _fits(self, members: list[Member]) -> bool:
        num_pages = sum(num_pages_of(m.last, PAGE_SIZE) - num_pages_of(m.first, PAGE_SIZE) for m in members)
        return num_pages * PAGE_SIZE <= self.allocator.available_size() + self.tree.evictable_size()

    def _launch_extend(self, members: list[Member], overlap: bool) -> None:
        lives = [member.life for member in members]
        self.chunked = None if members[-1].is_answered else lives[-1]
        self.waiting = [life for life in self.waiting if life not in lives]
        self.running += [life for life in lives if life is not self.chunked]
        batch = self._schedule_batch(lives)
        batch.prefix_lens = [member.first for member in members]
        batch.extend_lens = [member.last - member.first for member in members]
        batch.extend_num_tokens = sum(batch.extend_lens)
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([member.last for member in members])
        slots, _, _ = alloc_for_extend(batch)
        for member in members:
            member.life.req.kv_committed_len = member.last
            member.life.req.inflight_middle_chunks = int(member.life is self.chunked)
        self._launch(batch, members, slots, ForwardMode.EXTEND, overlap)

    def decode(self, overlap: bool) -> None:
        """One token for every running request, after as many are retracted as is needed for it."""
        self._stash_chunk()
        while self.running and not self._schedule_batch(self.running).check_decode_mem():
            self.retract(self.running[-1])
        if not self.running:
            return
        lives = list(self.running)
        batch = self._schedule_batch(lives)
        batch.req_pool_indices = torch.tensor([life.req.req_pool_idx for life in lives])
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([life.length for life in lives])
        slots = alloc_for_decode(batch, token_per_req=1)
        for life in lives:
            life.req.kv_committed_len += 1
        batch.seq_lens = batch.seq_lens_cpu = batch.seq_lens + 1
        members = [Member(life, life.length - 1, life.length, is_answered=True) for life in lives]
        self._launch(batch, members, slots, ForwardMode.DECODE, overlap)

    def _schedule_batch(self, lives: list[Life]) -> ScheduleBatch:
        return ScheduleBatch(
            [life.req for life in lives],
            self.rows,
            self.allocator,
            self.tree,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            device="cpu",
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )

    def _stash_chunk(self) -> None:
        """What a prompt that was cut has written so far goes to the tree, even while its last chunk is in flight."""
        req = self.chunked and self.chunked.req
        if req and req.extend_range.end > len(req.prefix_indices):
            self._cache_unfinished(req, is_chunk=True)

    def _cache_unfinished(self, req: Req, is_chunk: bool) -> None:
        """The full pages of a running request go to the tree, or are exchanged for those that it has."""
        row = self.rows.req_to_token[req.req_pool_idx]
        before = row.clone()
        self.tree.cache_unfinished_req(req, chunked=is_chunk)
        self.seen["exchanges"] += not row.equal(before)

    # The device

    def _launch(
        self, batch: ScheduleBatch, members: list[Member], slots: torch.Tensor, mode: ForwardMode, overlap: bool
    ) -> None:
        previous = self._run_in_flight()
        batch.chunked_req = self.chunked and self.chunked.req
        self.in_flight = Batch(self.backend, self.layers, self.ledger, batch, members, slots, mode)
        self._process(previous)
        if not overlap:
            self.settle()

    def settle(self) -> None:
        """The batch in flight runs, and its result reaches the scheduler."""
        self._process(self._run_in_flight())

    def _run_in_flight(self) -> Batch | None:
        """The device gets to the batch that was planned last."""
        batch, self.in_flight = self.in_flight, None
        if batch:
            batch.run()
            self.on_batch(batch)
        return batch

    def _process(self, batch: Batch | None) -> None:
        """The result of a batch reaches the scheduler; those that left meanwhile are skipped, as in SGLang."""
        answered = [member.life for member in batch.members if member.is_answered] if batch else []
        for life in [life for life in answered if life in self.running]:
            life.req.output_ids.append(life.text.ids[life.num_known])
            if life.num_known == MAX_TOKENS:
                self.finish(life)
            elif batch.mode.is_extend():
                life.is_answered = True
                self._cache_unfinished(life.req, is_chunk=False)
