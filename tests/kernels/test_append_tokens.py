"""Appending writes a token to all its places and nowhere else, and flags the heads whose query has moved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freekv_kernels import REFERENCE, Batch, Count, FlagList, PageStore
from tests.support import fp8
from tests.support.op_tables import decode_keys

PAGES, LAYERS, LAYER, PAGE, BLOCKS = 7, 2, 1, 8, 5


def batch_of(slots, num_pages, budget_pages, rows, device, heads=2):
    budget_pages = [[pages] * heads for pages in budget_pages]
    slots, num_pages, budget_pages, rows = (
        torch.tensor(x, device=device) for x in (slots, num_pages, budget_pages, rows)
    )
    unused = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
    return Batch(rows, slots, unused, num_pages, num_pages, budget_pages, unused[0])


def flag_list(num_rows, device):
    return FlagList(
        torch.full((num_rows,), -7, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.ones(num_rows, dtype=torch.bool, device=device),
    )


def make(impl, heads=2, group=3, dim=16, dtype=torch.float32):
    """Three requests: at offset 5 of page 3, at offset 0 of page 4, at the end of page 6; the last is in its budget."""

    def randn(*shape):
        return torch.randn(shape).to(dtype).to(impl.device)

    table = torch.full((PAGES, heads), -1, dtype=torch.int32, device=impl.device)
    table[3, 0], table[4, heads - 1], table[5, 0] = 2, 4, 1
    return SimpleNamespace(
        q=randn(3, heads, group, dim),
        k=randn(3, heads, dim),
        v=randn(3, heads, dim),
        batch=batch_of([3 * PAGE + 5, 4 * PAGE, 7 * PAGE - 1], [9, 9, 3], [4, 4, 4], [2, 5, 1], impl.device, heads),
        tau=0.5,
        host=impl.host(torch.randn(PAGES, LAYERS, heads, 2, PAGE, dim).to(dtype)),
        summary=fp8.bounds(randn(PAGES, heads, 2, dim).sort(2).values),
        block_kv=randn(BLOCKS, 2, PAGE, dim),
        table=table,
        last_q=randn(6, heads, group, dim),
        flags=flag_list(3 * heads, impl.device),
        counters=torch.arange(len(Count), device=impl.device) * 10,
        queries=randn(3, heads, group, dim),
    )


def append(ops, case, *encoded):
    store = PageStore(case.host[:, LAYER], case.summary, case.block_kv, case.table)
    kept = (case.last_q, case.flags, case.counters, case.queries)
    ops.append_tokens(case.q, case.k, case.v, case.batch, case.tau, store, *kept, *encoded)
    if case.q.is_cuda:
        torch.cuda.synchronize()


def flagged(case):
    """The flagged rows, after a check that the list, its count and the counter agree with `is_flagged`."""
    rows = case.flags.is_flagged.nonzero().flatten().tolist()
    assert case.flags.count.item() == len(rows)
    assert sorted(case.flags.rows[: len(rows)].tolist()) == rows
    assert (case.flags.rows[len(rows) :] == -7).all()  # past the list nothing is written
    return rows


@pytest.mark.parametrize(
    ("heads", "group", "dim", "dtype"),
    [
        (2, 1, 64, torch.float16),
        (2, 3, 96, torch.float32),
        (1, 8, 16, torch.bfloat16),
        (3, 16, 16, torch.bfloat16),
        (2, 4, 256, torch.bfloat16),
    ],
)
def test_append_writes_host_summary_and_only_resident_blocks_and_nothing_else(impl, heads, group, dim, dtype):
    case = make(impl, heads, group, dim, dtype)
    host, block_kv, summary = case.host.clone(), case.block_kv.clone(), case.summary.clone()
    table, last_q = case.table.clone(), case.last_q.clone()
    append(impl.ops, case)
    for request, slot in enumerate(case.batch.slots.tolist()):
        page, offset = divmod(slot, PAGE)
        for head in range(heads):
            k, v = case.k[request, head], case.v[request, head]
            host[page, LAYER, head, 0, offset], host[page, LAYER, head, 1, offset] = k.cpu(), v.cpu()
            if (block := table[page, head].item()) >= 0:
                block_kv[block, 0, offset], block_kv[block, 1, offset] = k, v
            low, high = fp8.numbers(summary[page, head]).to(k.device) if offset else (k, k)
            summary[page, head] = fp8.bounds(torch.stack((torch.minimum(low, k), torch.maximum(high, k))))
        last_q[case.batch.rows[request]] = case.q[request]
    assert torch.equal(case.host, host)
    assert torch.equal(case.block_kv, block_kv)
    assert torch.equal(case.summary, summary)
    assert torch.equal(case.table, table)
    assert torch.equal(case.last_q, last_q)
    assert torch.equal(case.queries, case.q)


def test_in_a_dense_layer_tokens_are_written_and_queries_are_neither_compared_nor_kept(impl):
    case = make(impl)
    torch.manual_seed(0)
    dense = make(impl)
    last_q, counters = dense.last_q.clone(), dense.counters.clone()
    dense.tau, dense.flags = 2.0, None
    append(impl.ops, case)
    append(impl.ops, dense)
    for name in ("host", "summary", "block_kv", "queries"):
        assert torch.equal(getattr(dense, name), getattr(case, name))
    assert torch.equal(dense.last_q, last_q) and torch.equal(dense.counters, counters)


@pytest.mark.parametrize("past", [0x7F, 0x7E, 0xFE, 0xFF])  # NaN, 448, -448, NaN
def test_a_page_that_is_opened_forgets_its_past(impl, past):
    case = make(impl)
    case.summary[4] = past
    append(impl.ops, case)
    assert torch.equal(case.summary[4], fp8.bounds(case.k[1][:, None].expand(-1, 2, -1)))


def test_tokens_appended_one_by_one_leave_the_page_and_its_bounds(impl):
    case = make(impl)
    keys, values = torch.randn(2, 5, 3, 2, 16, device=impl.device)
    for offset, (case.k, case.v) in enumerate(zip(keys, values, strict=True)):
        pages = torch.tensor([3, 4, 5], device=impl.device)
        case.batch = case.batch._replace(slots=pages * PAGE + offset)
        case.flags.count.zero_()
        append(impl.ops, case)
    for request, page in enumerate((3, 4, 5)):
        assert torch.equal(case.host[page, LAYER, :, 0, :5].to(impl.device), keys[:, request].transpose(0, 1))
        assert torch.equal(case.host[page, LAYER, :, 1, :5].to(impl.device), values[:, request].transpose(0, 1))
        assert torch.equal(case.summary[page, :, 0].cpu(), fp8.below(keys[:, request].amin(0)))
        assert torch.equal(case.summary[page, :, 1].cpu(), fp8.above(keys[:, request].amax(0)))
    assert torch.equal(case.block_kv[2, 0, :5], keys[:, 0, 0]) and torch.equal(case.block_kv[1, 1, :5], values[:, 2, 0])


def filling(impl, dtype=torch.float32):
    """Two requests that fill their pages, 3 and 5, and one that does not; the first head's blocks hold what they do."""
    case = make(impl, dtype=dtype)
    case.batch = case.batch._replace(slots=torch.tensor([4 * PAGE - 1, 4 * PAGE, 6 * PAGE - 1], device=impl.device))
    k = case.host[:, LAYER, :, 0]
    case.summary.copy_(fp8.bounds(torch.stack((k[:, :, :-1].amin(2), k[:, :, :-1].amax(2)), 2)))
    for page, head in ((3, 0), (5, 0)):
        case.block_kv[case.table[page, head]] = case.host[page, LAYER, head].to(impl.device)
    return case


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_is_encoded_with_the_token_that_fills_it_and_no_other_page_is(impl, bits, dtype):
    case = filling(impl, dtype)
    codes = torch.randint(256, (PAGES, 2, PAGE, 2 * bits), dtype=torch.uint8).to(impl.device)
    before = codes.clone()
    append(impl.ops, case, codes)
    decoded, step = decode_keys(case.summary[[3, 5]], codes[[3, 5]])
    k = case.host[[3, 5], LAYER, :, 0].double()
    assert torch.equal(k[:, :, -1], case.k[[0, 2]].cpu().double())
    assert ((decoded - k).abs() <= step / 2 + 1e-6 * (k.abs() + step)).all()
    others = [0, 1, 2, 4, 6]
    assert torch.equal(codes[others], before[others])


@pytest.mark.parametrize("groups", [None, [[1, 6, 2, 3], [-1] * 4, [-1] * 4]], ids=["no-groups", "a-group-ends"])
def test_what_append_and_encode_write_in_turn_append_alone_writes(impl, groups):
    case, codes = filling(impl), torch.zeros(PAGES, 2, PAGE, 4, dtype=torch.uint8, device=impl.device)
    in_turn = SimpleNamespace(**vars(case))
    for name in ("host", "summary", "block_kv", "last_q", "counters", "queries"):
        setattr(in_turn, name, getattr(case, name).clone())
    in_turn.host, in_turn.flags = impl.host(in_turn.host), flag_list(6, impl.device)
    own, expected = codes.clone(), codes
    groups = None if groups is None else torch.tensor(groups, device=impl.device)
    append(impl.ops, case, own, groups)
    append(impl.ops, in_turn)
    store = PageStore(in_turn.host[:, LAYER], in_turn.summary, in_turn.block_kv, in_turn.table)
    impl.ops.encode_pages(case.batch.slots, store, expected, groups)
    assert torch.equal(own, expected) and own[[3, 5]].any()
    for name in ("host", "summary", "block_kv", "last_q", "counters", "queries"):
        assert torch.equal(getattr(case, name), getattr(in_turn, name))


@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_a_head_is_flagged_where_the_mean_cosine_of_its_group_is_below_tau(impl, group):
    case = make(impl, heads=3, group=group)
    case.last_q[case.batch.rows] = 2 * case.q  # scaling moves nothing
    case.last_q[2, 1, 0] *= -1  # the first request's head 1: mean cosine (group - 2) / group
    case.last_q[1] *= -1  # the third request is in its budget
    mean = (group - 2) / group
    for tau, expected in ((mean + 0.01, [1]), (mean - 0.01, [])):
        case.tau, case.flags = tau, flag_list(9, impl.device)
        before, counters = case.last_q.clone(), case.counters.clone()
        append(impl.ops, case)
        assert flagged(case) == expected
        counters[Count.ROWS] += 2 * 3
        counters[Count.PAGES_READ] += case.batch.budget_pages[:2].sum()
        counters[Count.FLAGGED_ROWS] += len(expected)
        counters[Count.SCORED_ROWS] += 2 * 3
        counters[Count.SCORED_PAGES] += 2 * 3 * 9
        assert torch.equal(case.counters, counters)
        case.last_q.copy_(before)


def test_tau_above_one_flags_every_row_over_its_budget_and_no_other(impl):
    case = make(impl)
    case.last_q[case.batch.rows] = case.q
    case.tau = 1.01
    append(impl.ops, case)
    assert flagged(case) == [0, 1, 2, 3]
    assert case.counters[[Count.ROWS, Count.FLAGGED_ROWS]].tolist() == [4, 14]


def test_a_request_as_long_as_its_budget_is_not_over_it(impl):
    case = make(impl)
    case.tau = 1.01
    case.batch = case.batch._replace(num_pages=case.batch.budget_pages[:, 0].clone())
    append(impl.ops, case)
    assert flagged(case) == []
    assert case.counters[[Count.ROWS, Count.FLAGGED_ROWS]].tolist() == [0, 10]


def test_norms_are_clamped_so_a_query_of_zeros_has_cosine_zero(impl):
    case = make(impl)
    case.q[0] = 0  # cosine 0
    case.q[1] = 0
    case.q[1, :, :, 0] = 1e-9  # norm counts as 1e-8: cosine 0.1
    case.last_q[5] = 0
    case.last_q[5, :, :, 0] = 3
    for tau, expected in ((-0.01, []), (0.01, [0, 1]), (0.09, [0, 1]), (0.11, [0, 1, 2, 3])):
        case.tau, case.flags = tau, flag_list(6, impl.device)
        before = case.last_q.clone()
        append(impl.ops, case)
        assert flagged(case) == expected
        case.last_q.copy_(before)


def test_padding_reaches_only_the_padding_page_and_the_padding_row(impl):
    case = make(impl)
    host, summary, last_q = case.host.clone(), case.summary.clone(), case.last_q.clone()
    block_kv = case.block_kv.clone()
    case.tau = 2.0
    case.batch = batch_of([0, 0, 0], [0, 0, 0], [0, 4, 0], [0, 0, 0], impl.device)
    append(impl.ops, case)
    assert flagged(case) == [] and case.counters[Count.ROWS] == 0
    assert torch.equal(case.host[1:], host[1:]) and torch.equal(case.host[0, 0], host[0, 0])
    assert torch.equal(case.summary[1:], summary[1:])
    assert torch.equal(case.last_q[1:], last_q[1:])
    assert torch.equal(case.block_kv, block_kv)


def test_slices_of_a_fused_projection_are_read_in_place(impl):
    contiguous = make(impl)
    torch.manual_seed(0)
    sliced = make(impl)
    q, k, v = (x.flatten(1) for x in (sliced.q, sliced.k, sliced.v))
    fused = torch.cat((v, q, torch.full_like(k, float("nan")), k), 1)
    v, q, _, k = fused.split([v.shape[1], q.shape[1], k.shape[1], k.shape[1]], 1)
    sliced.q, sliced.k, sliced.v = q.view(sliced.q.shape), k.view(sliced.k.shape), v.view(sliced.v.shape)
    assert not sliced.k.is_contiguous()
    append(impl.ops, contiguous)
    append(impl.ops, sliced)
    for name in ("host", "summary", "block_kv", "last_q", "queries"):
        assert torch.equal(getattr(sliced, name), getattr(contiguous, name))
    assert flagged(sliced) == flagged(contiguous)


def test_pages_and_blocks_past_two_billion_elements_are_reached(impl):
    if impl.device == "cuda":
        pytest.skip("costs gigabytes of pinned memory; untouched CPU memory costs nothing")
    case = make(impl, dtype=torch.float16)
    record, far = 2 * 2 * PAGE * 16, 2**30 + 64  # elements of a page of one layer, and from page to page
    memory = torch.empty(2 * far + 2 * record, dtype=torch.float16)
    case.host = memory.as_strided((3, LAYERS, 2, 2, PAGE, 16), (far, record, record // 2, PAGE * 16, 16, 1))
    case.block_kv = torch.empty(2**31 // (record // 2) + 2, 2, PAGE, 16, dtype=torch.float16)
    case.table[2, 1] = last = len(case.block_kv) - 1
    case.batch = case.batch._replace(slots=torch.tensor([2 * PAGE + 3, PAGE, 1]))
    append(impl.ops, case)
    assert torch.equal(case.host[2, LAYER, :, 0, 3], case.k[0])
    assert torch.equal(case.block_kv[last, 1, 3], case.v[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_equals_the_reference(impl, dtype):
    case = make(impl, heads=3, group=5, dim=32, dtype=dtype)
    case.last_q[2] = case.q[0] + 0.8 * torch.randn_like(case.q[0])
    case.tau = 0.75
    torch.manual_seed(0)
    expected = make(SimpleNamespace(device="cpu", host=lambda x: x), heads=3, group=5, dim=32, dtype=dtype)
    expected.last_q, expected.tau = case.last_q.cpu().clone(), case.tau
    append(impl.ops, case)
    append(REFERENCE, expected)
    for name in ("host", "summary", "block_kv", "last_q", "counters"):
        assert torch.equal(getattr(case, name).cpu(), getattr(expected, name))
    assert flagged(case) == flagged(expected)


@pytest.mark.parametrize("opens_page", [False, True])
def test_rows_are_due_where_no_steps_are_left_or_a_page_opens_and_others_wait_a_step_less(impl, opens_page):
    case = make(impl)
    case.batch = case.batch._replace(num_pages_next=case.batch.num_pages + torch.tensor([opens_page, 0, 0]))
    left = torch.tensor([[3, 0], [1, 2], [5, 0]], dtype=torch.int32)  # by request and head; the last is in its budget
    pace = torch.full((6, 2, 2), 8, dtype=torch.int32, device=impl.device)
    pace[case.batch.rows, :, 1] = left.to(impl.device)
    due, counters = flag_list(6, impl.device), case.counters.clone()
    append(impl.ops, case, None, None, pace, due)
    expected = [0, 1] if opens_page else [1]
    assert due.is_flagged.nonzero().flatten().tolist() == expected == sorted(due.rows[: due.count.item()].tolist())
    assert (due.rows[len(expected) :] == -7).all()
    after = torch.tensor([[3 if opens_page else 2, 0], [0, 1], [5, 0]], dtype=torch.int32)
    assert torch.equal(pace[case.batch.rows, :, 1].cpu(), after)
    assert (pace[..., 0] == 8).all()
    grown = (case.counters - counters).tolist()
    assert (grown[Count.SCORED_ROWS], grown[Count.SCORED_PAGES]) == (len(expected), 9 * len(expected))


def test_without_a_pace_every_row_over_its_next_budget_is_scored(impl):
    case = make(impl)
    case.batch = case.batch._replace(num_pages_next=case.batch.num_pages + torch.tensor([0, 0, 2]))
    before = case.counters.clone()
    append(impl.ops, case)
    grown = (case.counters - before).tolist()
    assert (grown[Count.SCORED_ROWS], grown[Count.SCORED_PAGES]) == (6, 2 * (9 + 9 + 3))
