"""Attention ops against softmax written out, in float64."""

import pytest
import torch

from freekv_kernels import add_sinks, attend_ragged, attend_window, cap_logits, merge_states

SCALE = 0.3


def dense(q, k, v, mask=None, cap=0.0, sinks=None):
    """q [n, Hq, D], k and v [m, H, D], sinks [Hq] -> [n, Hq, D] and lse [n, Hq] without the sinks, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->nhm", q.double(), k) * SCALE
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        weights = torch.cat([logits, sinks.double().expand(len(q), -1)[..., None]], -1).softmax(-1)[..., :-1]
        return torch.einsum("nhm,mhd->nhd", weights, v), logits.logsumexp(-1)
    return torch.einsum("nhm,mhd->nhd", logits.softmax(-1), v), logits.logsumexp(-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_a_row_attends_to_its_own_blocks_in_order_up_to_its_last_token(group_size, dtype, tolerance):
    heads, page, dim = 2, 8, 16
    blocks = torch.randn(20, 2, page, dim).to(dtype)
    num_pages = torch.tensor([1, 1, 3, 3, 8, 8])
    indptr = torch.cat([torch.zeros(1), num_pages.cumsum(0)]).int()
    indices = torch.cat([torch.randperm(20)[:n] for n in num_pages]).int()
    last_page_len = torch.tensor([1, 1, 5, 5, 8, 8], dtype=torch.int32)
    q = torch.randn(6, group_size, dim).to(dtype)
    out = attend_window(q, blocks, indptr, indices, last_page_len, heads, SCALE)
    for row in range(6):
        own = blocks[indices[indptr[row] : indptr[row + 1]].long()]
        kv_len = (num_pages[row] - 1) * page + last_page_len[row]
        k, v = (own[:, i].reshape(-1, 1, dim)[:kv_len] for i in (0, 1))
        expected, _ = dense(q[row][None], k, v)
        torch.testing.assert_close(out[row][None].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prefix, chunk", [(0, 7), (5, 1), (40, 33)])
def test_the_parts_of_a_prompt_merge_to_causal_attention(prefix, chunk):
    q, k, v = torch.randn(chunk, 6, 16), torch.randn(prefix + chunk, 2, 16), torch.randn(prefix + chunk, 2, 16)
    state = attend_ragged(q, k[prefix:], v[prefix:], SCALE, causal=True)
    for start in range(0, prefix, 16):
        end = min(start + 16, prefix)
        state = merge_states(*state, *attend_ragged(q, k[start:end], v[start:end], SCALE, causal=False))
    mask = torch.arange(prefix + chunk) <= torch.arange(prefix, prefix + chunk)[:, None]
    out, lse = dense(q, k, v, mask)
    torch.testing.assert_close(state[0].double(), out, rtol=0, atol=1e-5)
    torch.testing.assert_close(state[1].double(), lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [1, 5, 16, 19, 100, None])
def test_a_row_sees_its_window_with_capped_logits_and_the_sinks_of_its_heads(window, cap, with_sinks):
    heads, page, dim, group_size = 2, 8, 16, 3
    blocks = torch.randn(20, 2, page, dim)
    num_pages = torch.tensor([1, 1, 3, 3, 4, 2])  # the heads of the last request read different lengths
    indptr = torch.cat([torch.zeros(1), num_pages.cumsum(0)]).int()
    indices = torch.cat([torch.randperm(20)[:n] for n in num_pages]).int()
    last_page_len = torch.tensor([1, 1, 5, 5, 8, 8], dtype=torch.int32)
    q, sinks = torch.randn(6, group_size, dim), torch.randn(heads, group_size) if with_sinks else None
    out = attend_window(q, blocks, indptr, indices, last_page_len, heads, SCALE, window, cap, sinks)
    for row in range(6):
        own = blocks[indices[indptr[row] : indptr[row + 1]].long()]
        kv_len = int((num_pages[row] - 1) * page + last_page_len[row])
        seen = slice(max(kv_len - (window or kv_len), 0), kv_len)
        k, v = (own[:, i].reshape(-1, 1, dim)[seen] for i in (0, 1))
        expected, _ = dense(q[row][None], k, v, cap=cap, sinks=None if sinks is None else sinks[row % heads])
        torch.testing.assert_close(out[row][None].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [1, 5, 40, 100, None])
@pytest.mark.parametrize("tail, chunk", [(0, 7), (5, 1), (40, 200)])
def test_a_chunk_behind_the_tail_of_its_prefix_sees_a_window_of_both(tail, chunk, window, cap):
    num_keys = tail + chunk
    q, k, v = torch.randn(chunk, 6, 16), torch.randn(num_keys, 2, 16), torch.randn(num_keys, 2, 16)
    state = attend_ragged(q, k, v, SCALE, True, window, cap)
    key, query = torch.arange(num_keys), torch.arange(tail, num_keys)[:, None]
    expected = dense(q, k, v, (key <= query) & (key > query - (window or num_keys)), cap)
    for found, wanted in zip(state, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_sinks_are_added_to_a_softmax_that_is_known_by_its_log_sum_exp():
    q, k, v, sinks = torch.randn(5, 6, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16), torch.randn(6)
    out, lse = attend_ragged(q, k, v, SCALE, causal=False)
    expected, _ = dense(q, k, v, sinks=sinks)
    torch.testing.assert_close(add_sinks(out, lse, sinks).double(), expected, rtol=0, atol=1e-5)


def test_a_cap_bounds_logits_and_leaves_small_ones():
    logits = torch.tensor([-100.0, -0.01, 0.0, 0.01, 100.0])
    assert cap_logits(logits.clone(), 5.0).tolist() == pytest.approx([-5, -0.01, 0, 0.01, 5], abs=1e-4)
    assert cap_logits(logits.clone(), 0.0).equal(logits)
