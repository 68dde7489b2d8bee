"""Capturing a model's attention, and rules of selection on what was captured."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.needle import language as lang
from benchmarks.needle.samples import Label
from benchmarks.needle.transcripts import FAMILIES, draw_transcript
from benchmarks.study.capture import Layer, causal, load_model, prefill, prepare_model, run_tail
from benchmarks.study.rules import POOLINGS, RULES, SPECULATION, SUMMARIES, Rule, select
from benchmarks.study.selection import kept_weight, page_weights, visible_by

_RULE = Rule(page_size=16, sink=32, recent=32)
_TAIL, _TOKENS = 24, 500
_STEPS = torch.tensor([1, 2, 7, 15, 16, 23])


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=lang.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return Random(0).choices(range(lang.VOCAB_SIZE), k=_TOKENS)


@pytest.fixture(scope="module")
def layer() -> Layer:
    """Random queries that prefer a few keys, 2 per KV head."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(heads, n, 16, generator=generator) for heads, n in ((4, _TAIL), (2, _TOKENS), (2, _TOKENS)))
    return Layer(3 * q, k, v)


def test_document_and_tail_give_the_logits_of_the_whole_text(model, tokens):
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, -_TAIL:]
    try:
        prepare_model(model)
        capture = run_tail(model, prefill(model, tokens[:-_TAIL]), tokens[-_TAIL:])
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(capture.logits, expected, atol=1e-5, rtol=1e-4)


def test_captured_queries_and_keys_are_those_of_the_layer(model, tokens):
    """Attention recomputed from what was captured is what the output projection got."""
    inputs = []
    hooks = [
        x.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for x in model.model.layers
    ]
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        prepare_model(model)
        capture = run_tail(model, prefill(model, tokens[:-_TAIL]), tokens[-_TAIL:])
    finally:
        model.set_attn_implementation("sdpa")
    is_seen = causal(_TOKENS - _TAIL, _TAIL)
    for layer, expected in zip(capture.layers, inputs, strict=True):
        k, v = layer.k.repeat_interleave(2, 0), layer.v.repeat_interleave(2, 0)
        weights = (layer.q @ k.transpose(1, 2) / 4).masked_fill(~is_seen, float("-inf")).softmax(-1)
        out = (weights @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out, expected[0, -_TAIL:], atol=1e-5, rtol=1e-4)


@pytest.fixture
def prepared(model):
    yield prepare_model(model)
    model.set_attn_implementation("sdpa")


def test_a_budget_that_covers_the_context_changes_nothing(prepared, tokens):
    prefix, tail = prefill(prepared, tokens[:-_TAIL]), tokens[-_TAIL:]
    dense = run_tail(prepared, prefix, tail)
    covered = run_tail(prepared, prefix, tail, visible_by(_RULE, 512, _STEPS))
    assert torch.equal(covered.logits, dense.logits)


def test_a_small_budget_changes_decode_steps_only_from_the_first_on(prepared, tokens):
    prefix, tail = prefill(prepared, tokens[:-_TAIL]), tokens[-_TAIL:]
    dense = run_tail(prepared, prefix, tail)
    restricted = run_tail(prepared, prefix, tail, visible_by(_RULE, 96, torch.tensor([12])))
    is_same = (restricted.logits == dense.logits).all(-1)
    assert is_same[:12].all()
    assert not is_same[12]


def test_dense_layers_are_not_restricted(prepared, tokens):
    prefix, tail = prefill(prepared, tokens[:-_TAIL]), tokens[-_TAIL:]
    dense = run_tail(prepared, prefix, tail)
    restricted = run_tail(prepared, prefix, tail, visible_by(replace(_RULE, dense_layers=(0, 1)), 96, _STEPS))
    assert torch.equal(restricted.logits, dense.logits)


@pytest.mark.parametrize(
    ("summary", "pooling"), [*((name, "softmax") for name in SUMMARIES), *(("min-max", name) for name in POOLINGS)]
)
def test_windows_are_sink_recent_and_as_many_pages_as_the_budget(layer, summary, pooling):
    windows = select(replace(_RULE, summary=summary, pooling=pooling, parts=2), 128, layer.q, layer.k, _STEPS)
    assert windows.shape == (2, len(_STEPS), 32)
    assert (windows.sum(-1) == 8).all()
    last = (_TOKENS - _TAIL + _STEPS) // 16
    assert windows[..., :2].all()
    for i, page in enumerate(last):
        assert windows[:, i, page - 1 : page + 1].all()
        assert not windows[:, i, page + 1 :].any()


@pytest.mark.parametrize(
    "name", [name for name, rule in RULES.items() if rule.page_size == 32 and not rule.dense_layers]
)
def test_no_rule_keeps_more_weight_than_one_that_reads_every_key(layer, name):
    """Among the pages there is a choice of, each head's weights counted as shares, averaged over the group."""
    best = replace(_RULE, summary="sum of weights", pooling="scaled softmax")
    rule = replace(RULES[name], page_size=16, sink=32, recent=32)
    last = (_TOKENS - _TAIL + _STEPS[:, None]) // 16
    page = torch.arange(32)
    weights = page_weights(layer.q, layer.k, _STEPS, 16) * ((page >= 2) & (page < last - 1))
    weights /= weights.sum(-1, keepdim=True)
    kept, most = (
        kept_weight(weights, select(r, 128, layer.q, layer.k, _STEPS)).unflatten(0, (2, 2)).mean(1)
        for r in (rule, best)
    )
    assert (kept <= most + 1e-5).all()


def test_finer_summaries_bound_more_tightly_and_one_token_per_part_is_exact(layer):
    q, k = layer.q.unflatten(0, (2, 2)), layer.k[:, :480]
    k = k.to(torch.float8_e4m3fn).float()  # numbers that bounds can have
    exact = SUMMARIES["largest logit"](q, k, 16)
    coarse, fine, finest = (
        SUMMARIES["min-max"](q, k, 16 // parts).unflatten(-1, (-1, parts)).amax(-1) for parts in (1, 4, 16)
    )
    assert (coarse >= fine - 1e-4).all()
    assert (fine >= exact - 1e-4).all()
    torch.testing.assert_close(finest, exact)


def test_tau_chooses_between_this_query_and_the_previous_one(layer):
    q = layer.q.clone()
    q[:2, 7] = q[:2, 6] * 1.5  # the first KV head's queries keep their direction at the third step
    rules = {tau: select(replace(_RULE, tau=tau), 128, q, layer.k, _STEPS) for tau in (2.0, SPECULATION, 0.9)}
    before = select(_RULE, 128, q, layer.k, _STEPS - 1)
    assert torch.equal(rules[SPECULATION][0, 2], before[0, 2])
    assert torch.equal(rules[0.9][0, 2], rules[SPECULATION][0, 2])
    assert torch.equal(rules[0.9][:, [0, 1, 3, 4, 5]], rules[2.0][:, [0, 1, 3, 4, 5]])
    assert torch.equal(rules[0.9][1], rules[2.0][1])
    assert not torch.equal(rules[2.0], rules[SPECULATION])


@pytest.mark.parametrize("family", FAMILIES)
def test_transcripts_have_the_exact_length_and_steps_within_answers(family):
    transcript = draw_transcript(family, 0, 4096)
    assert len(transcript.document) + len(transcript.tail) == 4096
    assert len(transcript.tail) == len(transcript.labels)
    assert transcript == draw_transcript(family, 0, 4096)
    assert transcript != draw_transcript(family, 1, 4096)
    following = [transcript.labels[step + 1] for step in transcript.steps]
    assert Label.NONE not in following
    assert Label.JUMP in following
    prompts = [i for i, token in enumerate(transcript.tail) if token in (lang.QUESTION, lang.ANSWER)]
    assert not set(prompts) & set(transcript.steps.tolist())


def test_bad_input_is_named(layer, tmp_path):
    with pytest.raises(ValueError, match="budget 64 is used up by sink 32 and recent 32"):
        select(_RULE, 64, layer.q, layer.k, _STEPS)
    with pytest.raises(ValueError, match="unknown family 'tales'"):
        draw_transcript("tales", 0, 4096)
    with pytest.raises(ValueError, match="1024 tokens is too short"):
        draw_transcript("walk", 0, 1024)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_model(tmp_path)
