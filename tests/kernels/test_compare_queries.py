"""Similarity is the mean cosine of the group."""

import torch

from freekv_kernels import compare_queries


def test_similarity_is_the_mean_cosine_over_the_group():
    q, last_q = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16)
    cosine = (q * last_q).sum(-1) / (q.norm(dim=-1) * last_q.norm(dim=-1))
    torch.testing.assert_close(compare_queries(q, last_q), cosine.mean(-1))


def test_scaling_a_query_changes_nothing_and_turning_it_round_gives_minus_one():
    q = torch.randn(1, 2, 4, 16)
    torch.testing.assert_close(compare_queries(q, 3 * q), torch.ones(1, 2))
    torch.testing.assert_close(compare_queries(q, -q), -torch.ones(1, 2))
