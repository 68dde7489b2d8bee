"""Attention ops against softmax written out, in float64."""

import pytest
import torch

from freekv_kernels import attend_ragged, attend_window, merge_states

SCALE = 0.3


def dense(q, k, v, mask=None):
    """q [n, Hq, D], k and v [m, H, D] -> [n, Hq, D] and lse [n, Hq], in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->nhm", q.double(), k) * SCALE
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
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
