"""The attention objects of the engine, in torch on a CPU and on FlashInfer on a GPU, by the same assertions."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch

from sglang_freekv.attention.base import DecodeAttention
from sglang_freekv.attention.cpu import TorchPrefillAttention, TorchWindowAttention
from sglang_freekv.attention.prefix_pieces import PrefixPiece
from sglang_freekv.memory.geometry import Geometry

SCALE, PAGE, NUM_BLOCKS = 0.11, 32, 200
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass
class Impl:
    """One implementation, and where its tensors are."""

    device: str
    dtype: torch.dtype

    def geometry(self, group_size: int, head_dim: int, num_kv_heads: int = 2) -> Geometry:
        return Geometry(1, num_kv_heads * group_size, num_kv_heads, head_dim, self.dtype, PAGE)

    def window(self, geometry: Geometry, max_requests: int, max_pages: int) -> DecodeAttention:
        if self.device == "cpu":
            return TorchWindowAttention(geometry, max_requests, max_pages)
        module = import_module("sglang_freekv.attention.gpu")
        workspace = module.allocate_float_workspace(geometry, self.device)
        return module.FlashInferWindowAttention(geometry, max_requests, max_pages, self.device, workspace)

    def prefill(self, geometry: Geometry):
        if self.device == "cpu":
            return TorchPrefillAttention(geometry)
        module = import_module("sglang_freekv.attention.gpu")
        return module.FlashInferPrefillAttention(geometry, module.allocate_float_workspace(geometry, self.device))

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self.device, self.dtype)


@pytest.fixture(
    params=[
        pytest.param(Impl("cpu", torch.float32), id="torch"),
        pytest.param(Impl("cuda", torch.bfloat16), id="flashinfer-bf16", marks=pytest.mark.gpu),
        pytest.param(Impl("cuda", torch.float16), id="flashinfer-fp16", marks=pytest.mark.gpu),
    ]
)
def impl(request: pytest.FixtureRequest) -> Impl:
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def cuda() -> Impl:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Impl("cuda", torch.bfloat16)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None):
    """q [n, Hq, D], k and v [m, H, D] -> [n, Hq, D], in float64 on the CPU."""
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->nhm", q, k) * SCALE
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    return torch.einsum("nhm,mhd->nhd", logits.softmax(-1), v)


def begin_step(attention: DecodeAttention, kv_lens: list[int]) -> None:
    """Plan, then list random blocks for every row, and the lengths of their last pages, as kernels do in the engine."""
    heads, device = attention.geometry.num_kv_heads, attention.kv_indices.device
    num_pages = [(n + PAGE - 1) // PAGE for n in kv_lens for _ in range(heads)]
    attention.plan(num_pages)
    indices = torch.randint(NUM_BLOCKS, (sum(num_pages),))
    attention.kv_indices[: len(indices)] = indices.int().to(device)
    last_page_len = torch.tensor([(n - 1) % PAGE + 1 for n in kv_lens]).repeat_interleave(heads)
    attention.last_page_len[: len(last_page_len)] = last_page_len.int().to(device)


def check_rows(out: torch.Tensor, q: torch.Tensor, block_kv: torch.Tensor, attention: DecodeAttention, kv_lens):
    """Each row attended to the tokens of its blocks, and to no others."""
    heads, dim = q.shape[1], q.shape[-1]
    indptr, indices = attention.kv_indptr.tolist(), attention.kv_indices.long()
    for request, kv_len in enumerate(kv_lens):
        for head in range(heads):
            row = request * heads + head
            own = block_kv[indices[indptr[row] : indptr[row + 1]]]
            k, v = (own[:, half].reshape(-1, 1, dim)[:kv_len] for half in (0, 1))
            expected = softmax_attention(q[request, head][None], k, v)[0]
            torch.testing.assert_close(out[request, head].cpu().double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


def check_step(attention: DecodeAttention, q: torch.Tensor, block_kv: torch.Tensor, kv_lens: list[int]) -> None:
    begin_step(attention, kv_lens)
    out = attention.run(q, block_kv, SCALE)
    assert out.shape == q.shape and out.dtype == q.dtype
    check_rows(out, q, block_kv, attention, kv_lens)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group_size", [1, 3, 4, 5, 7, 8, 16])
def test_every_row_attends_to_its_blocks_whatever_its_length(impl, group_size, head_dim):
    geometry, kv_lens = impl.geometry(group_size, head_dim), [1, 32, 33, 700, 5, 257]
    attention = impl.window(geometry, max_requests=8, max_pages=32)
    block_kv, q = impl.randn(NUM_BLOCKS, 2, PAGE, head_dim), impl.randn(6, 2, group_size, head_dim)
    check_step(attention, q, block_kv, kv_lens)


@pytest.mark.parametrize("batch_size", [1, 40, 200])
def test_few_rows_and_many_are_attended_to_alike(impl, batch_size):
    """200 requests of 2 heads are more rows than blocks run at a time."""
    kv_lens = [1 + (37 * i) % 600 for i in range(batch_size)]
    attention = impl.window(impl.geometry(4, 64), max_requests=200, max_pages=20)
    block_kv, q = impl.randn(NUM_BLOCKS, 2, PAGE, 64), impl.randn(batch_size, 2, 4, 64)
    for lens in (kv_lens, kv_lens[::-1]):
        check_step(attention, q, block_kv, lens)


def test_a_plan_holds_while_last_pages_fill(impl):
    attention = impl.window(impl.geometry(4, 64), max_requests=4, max_pages=8)
    block_kv, q = impl.randn(NUM_BLOCKS, 2, PAGE, 64), impl.randn(2, 2, 4, 64)
    for kv_lens in ([33, 225], [50, 240], [64, 256]):
        check_step(attention, q, block_kv, kv_lens)


def test_lengths_written_before_a_plan_are_kept(impl):
    attention = impl.window(impl.geometry(4, 64), max_requests=4, max_pages=8)
    attention.last_page_len.copy_(torch.arange(1, 9))
    for num_pages in ([3, 1], [4, 1], [4, 1, 1]):
        attention.plan(num_pages)
        assert attention.last_page_len.tolist() == list(range(1, 9))


def test_batch_sizes_may_alternate(impl):
    attention = impl.window(impl.geometry(4, 64), max_requests=4, max_pages=8)
    block_kv = impl.randn(NUM_BLOCKS, 2, PAGE, 64)
    for kv_lens in ([40, 200], [250, 3, 100], [40, 200], [1]):
        q = impl.randn(len(kv_lens), 2, 4, 64)
        check_step(attention, q, block_kv, kv_lens)


def test_heads_of_one_request_may_read_unequally_many_blocks(impl):
    attention = impl.window(impl.geometry(4, 64), max_requests=2, max_pages=8)
    block_kv, q = impl.randn(NUM_BLOCKS, 2, PAGE, 64), impl.randn(2, 2, 4, 64)
    num_pages, last_lens = [1, 8, 3, 3], [5, 5, PAGE, PAGE]
    attention.plan(num_pages)
    attention.kv_indices[:15] = torch.randint(NUM_BLOCKS, (15,)).int().to(attention.kv_indices.device)
    attention.last_page_len[:4] = torch.tensor(last_lens).int().to(attention.kv_indices.device)
    out = attention.run(q, block_kv, SCALE)
    indptr, indices = attention.kv_indptr.tolist(), attention.kv_indices.long()
    for row, (n, last_len) in enumerate(zip(num_pages, last_lens, strict=True)):
        own = block_kv[indices[indptr[row] : indptr[row + 1]]]
        k, v = (own[:, half].reshape(-1, 1, 64)[: (n - 1) * PAGE + last_len] for half in (0, 1))
        expected = softmax_attention(q.flatten(0, 1)[row][None], k, v)[0]
        torch.testing.assert_close(out.flatten(0, 1)[row].cpu().double(), expected, rtol=0, atol=TOLERANCE[q.dtype])


class CountedPlans(TorchWindowAttention):
    """Counts how often the kernel is planned, and may fail to."""

    count, fails = 0, False

    def _plan_rows(self, num_rows: int, indptr: torch.Tensor) -> None:
        if self.fails:
            raise RuntimeError("planted")
        self.count += 1
        assert torch.equal(indptr, self.kv_indptr[: num_rows + 1])


def test_only_other_page_counts_are_planned():
    attention = CountedPlans(Impl("cpu", torch.float32).geometry(4, 64), max_requests=4, max_pages=8)
    num_pages = [2, 2, 3, 3]
    attention.plan(num_pages)
    attention.plan([2, 2, 3, 3])
    assert (attention.count, attention.kv_indptr[:5].tolist()) == (1, [0, 2, 4, 7, 10])
    num_pages[0] = 4  # the caller's list
    attention.plan([2, 2, 3, 3])
    assert attention.count == 1
    attention.plan([2, 2, 3, 3, 1, 1])
    attention.plan([2, 2, 3, 3])
    assert (attention.count, attention.num_rows) == (3, 4)


def test_after_a_plan_that_failed_the_same_batch_and_the_one_before_are_planned_anew():
    attention = CountedPlans(Impl("cpu", torch.float32).geometry(4, 64), max_requests=4, max_pages=8)
    before, failed = [2, 2], [3, 3]
    attention.plan(before)
    attention.fails = True
    with pytest.raises(RuntimeError, match="planted"):
        attention.plan(failed)
    attention.fails = False
    for count, num_pages in ((2, failed), (3, before)):
        attention.plan(num_pages)
        assert attention.count == count
    attention.fails = True
    with pytest.raises(RuntimeError, match="planted"):
        attention.plan(failed)
    attention.fails = False
    attention.plan(before)
    assert attention.count == 4


@pytest.mark.parametrize("num_pages", [[1] * 10, [0, 1], [9, 9]])
def test_a_batch_beyond_the_page_lists_is_refused(num_pages):
    attention = TorchWindowAttention(Impl("cpu", torch.float32).geometry(4, 64), max_requests=4, max_pages=8)
    with pytest.raises(ValueError, match="at most 4 of 1 to 8"):
        attention.plan(num_pages)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [2, 200])
@pytest.mark.parametrize("group_size", [1, 7, 16])
def test_a_graph_captured_with_one_page_each_replays_other_lengths(cuda, group_size, batch_size):
    attention = cuda.window(cuda.geometry(group_size, 128), max_requests=200, max_pages=64)
    block_kv, q = cuda.randn(NUM_BLOCKS, 2, PAGE, 128), cuda.randn(batch_size, 2, group_size, 128)
    begin_step(attention, [1] * batch_size)
    for _ in range(2):
        attention.run(q, block_kv, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.run(q, block_kv, SCALE)
    for longest in (2000, 1, 300, 64 * PAGE):
        kv_lens = [max(1, longest - 77 * i) for i in range(batch_size)]
        begin_step(attention, kv_lens)
        q.copy_(cuda.randn(*q.shape))
        graph.replay()
        check_rows(out, q, block_kv, attention, kv_lens)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group_size", [1, 8, 16])
def test_workspaces_hold_every_plan(cuda, group_size, head_dim):
    """FlashInfer itself raises where a workspace is too small."""
    geometry = cuda.geometry(group_size, head_dim, num_kv_heads=8)
    attention, prefill = cuda.window(geometry, max_requests=256, max_pages=4096), cuda.prefill(geometry)
    for batch_size in (1, 2, 16, 32, 33, 36, 37, 256):
        for num_pages in (1, 64, 4096):
            attention.plan([num_pages] * (batch_size * attention.geometry.num_kv_heads))
    for extend_lens in ([1], [20], [8192], [1] * 256, [100] * 80):
        for num_tokens in (PAGE, 16384):
            pieces = [PrefixPiece(i, torch.empty(0), i * num_tokens, num_tokens) for i in range(len(extend_lens))]
            prefill.plan(extend_lens, [pieces])


def prompts(impl: Impl, geometry: Geometry, prefix_lens: list[int], extend_lens: list[int], arena_tokens: int):
    """Queries, keys and values of whole prompts, and the groups of the arena with what they hold."""
    shape = geometry.num_kv_heads, geometry.head_dim
    whole = [impl.randn(2, p + n, *shape) for p, n in zip(prefix_lens, extend_lens, strict=True)]
    groups, arenas, used = [], [], arena_tokens
    for request, prefix_len in enumerate(prefix_lens):
        start = 0
        while start < prefix_len:
            if used == arena_tokens:
                groups.append([])
                arenas.append(impl.randn(arena_tokens, 2, *shape))
                used = 0
            num_tokens = min(prefix_len - start, arena_tokens - used)
            arenas[-1][used : used + num_tokens] = whole[request][:, start : start + num_tokens].transpose(0, 1)
            groups[-1].append(PrefixPiece(request, torch.empty(0), used, num_tokens))
            start, used = start + num_tokens, used + (num_tokens + PAGE - 1) // PAGE * PAGE
    return whole, groups, arenas


@pytest.mark.parametrize(
    "prefix_lens, extend_lens",
    [
        ([0], [70]),
        ([64], [1]),
        ([1000], [33]),  # pieces in several groups
        ([0, 96, 0, 200, 33, 320], [5, 1, 40, 64, 17, 3]),  # without a prefix between others, and partial pages
        ([128, 128, 128], [32, 32, 32]),
    ],
)
@pytest.mark.parametrize("group_size, head_dim", [(1, 64), (4, 128), (5, 128), (8, 256), (16, 64)])
def test_a_chunk_and_the_groups_of_its_prefixes_are_causal_attention(
    impl, group_size, head_dim, prefix_lens, extend_lens
):
    geometry = impl.geometry(group_size, head_dim)
    whole, groups, arenas = prompts(impl, geometry, prefix_lens, extend_lens, arena_tokens=256)
    q = impl.randn(sum(extend_lens), geometry.num_qo_heads, head_dim)
    new = torch.cat([kv[:, p:] for kv, p in zip(whole, prefix_lens, strict=True)], 1)
    attention = impl.prefill(geometry)
    attention.plan(extend_lens, groups)
    for _ in range(2):  # layers
        state = attention.attend_chunk(q, new[0], new[1], SCALE)
        for group, arena in enumerate(arenas):
            state = attention.attend_prefix(state, q, group, arena, SCALE)
        out = attention.finish(state)
    assert out.shape == q.shape and out.dtype == q.dtype
    first = 0
    for kv, prefix, extend in zip(whole, prefix_lens, extend_lens, strict=True):
        mask = torch.arange(prefix + extend) <= torch.arange(prefix, prefix + extend)[:, None]
        expected = softmax_attention(q[first : first + extend], kv[0], kv[1], mask)
        torch.testing.assert_close(
            out[first : first + extend].cpu().double(), expected, rtol=0, atol=TOLERANCE[q.dtype]
        )
        first += extend


@pytest.mark.parametrize(
    "pieces, runs",
    [
        ([(0, 0, 64), (1, 64, 32)], [[0, 1]]),
        ([(0, 0, 64), (2, 64, 32)], [[0], [2]]),  # a request without a piece
        ([(0, 0, 40), (1, 64, 32), (2, 96, 32)], [[0], [1, 2]]),  # a partial page
    ],
)
def test_a_group_is_cut_where_queries_or_keys_are_not_adjacent(pieces, runs):
    adjacent_pieces = import_module("sglang_freekv.attention.gpu").adjacent_pieces
    group = [PrefixPiece(request, torch.empty(0), first, num_tokens) for request, first, num_tokens in pieces]
    assert [[piece.request for piece in run] for run in adjacent_pieces(group)] == runs


@pytest.mark.parametrize(
    "group_size, head_dim, dtype", [(4, 96, torch.float16), (17, 128, torch.bfloat16), (4, 64, torch.float32)]
)
def test_shapes_without_a_kernel_are_refused(group_size, head_dim, dtype):
    with pytest.raises(ValueError, match="supported are"):
        import_module("sglang_freekv.attention.gpu").check_supported(Impl("cuda", dtype).geometry(group_size, head_dim))
