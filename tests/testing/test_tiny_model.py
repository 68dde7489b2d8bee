"""The generated checkpoint is fit to tell a correct attention from a wrong one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_freekv.testing.tiny_model import TinyModel

CONTEXT_TOKENS = 512


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    TinyModel(arch=request.param, layers=3).write(out)
    return out


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(256, (8, CONTEXT_TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def continuations(model, prompts: torch.Tensor) -> torch.Tensor:
    tokens = model.generate(prompts, max_new_tokens=48, do_sample=False, eos_token_id=None)
    return tokens[:, CONTEXT_TOKENS:]


@torch.no_grad()
def next_tokens(model, prompts: torch.Tensor) -> torch.Tensor:
    return model(prompts).logits[:, -1].argmax(-1)


@torch.no_grad()
def test_greedy_tokens_are_far_from_ties(model, prompts, continuations):
    logits = model(torch.cat([prompts, continuations], dim=1)).logits[:, CONTEXT_TOKENS - 1 : -1]
    best = logits.topk(2, dim=-1).values
    margin = best[..., 0] - best[..., 1]
    assert margin.median() > 0.5
    # Summation order moves a float32 logit by about 1e-5; a near tie is a rare accident, not the rule.
    assert (margin < 0.01).float().mean() < 0.02


def test_next_token_depends_on_the_distant_half_of_the_context(model, prompts):
    changed = prompts.clone()
    changed[:, : CONTEXT_TOKENS // 2] = prompts.roll(1, dims=0)[:, : CONTEXT_TOKENS // 2]
    differs = next_tokens(model, prompts) != next_tokens(model, changed)
    assert differs.float().mean() >= 0.5


def test_continuations_neither_collapse_nor_agree(continuations):
    pairs = [set(itertools.pairwise(row)) for row in continuations.tolist()]
    assert sorted(map(len, pairs))[len(pairs) // 2] >= 16
    repeats = continuations[:, 1:] == continuations[:, :-1]
    assert repeats.float().mean() < 0.1
    assert len(set(map(tuple, continuations.tolist()))) == len(continuations)


@torch.no_grad()
def test_attention_is_neither_uniform_nor_one_hot(checkpoint, prompts):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    for weights in model(prompts, output_attentions=True).attentions:
        last = weights[:, :, -1]  # [batch, heads, keys]
        effective_keys = torch.special.entr(last).sum(-1).exp().mean()
        assert 3 < effective_keys < CONTEXT_TOKENS / 3


@torch.no_grad()
def test_consecutive_queries_are_alike_in_the_first_group_and_not_in_the_last(model, prompts):
    attention, queries = model.model.layers[-1].self_attn, []
    hook = attention.q_proj.register_forward_hook(lambda module, args, out: queries.append(out))
    model(prompts)
    hook.remove()
    q = queries[0].unflatten(-1, (model.config.num_key_value_heads, -1, attention.head_dim))
    cosine = torch.cosine_similarity(q[:, 1:], q[:, :-1], dim=-1).mean(dim=(0, 1, 3))  # [kv_heads]
    assert cosine[0] > 0.8
    assert cosine[-1] < 0.7


def test_same_seed_gives_same_bytes_and_another_seed_other_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        TinyModel(layers=1, seed=seed).write(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    weights, other = TinyModel(layers=1, seed=0).weights(), TinyModel(layers=1, seed=1).weights()
    assert not any(torch.equal(weights[name], other[name]) for name in weights if "proj" in name)


@pytest.mark.parametrize("text", ["plain", "  two\n\tlines ", "Grüße, 你好 👋", "\x00\x7f", "<|reserved_0|>"])
def test_any_text_survives_the_tokenizer(checkpoint, text):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_tokenizer_knows_every_id_of_the_model(checkpoint, model):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == model.config.vocab_size
    assert all(tokenizer.convert_ids_to_tokens(range(model.config.vocab_size)))


def test_only_printable_ascii_is_generated_even_when_sampled(checkpoint, model, prompts):
    torch.manual_seed(0)
    tokens = model.generate(prompts, max_new_tokens=24, do_sample=True, top_k=0, eos_token_id=None)
    text = "".join(AutoTokenizer.from_pretrained(checkpoint).batch_decode(tokens[:, CONTEXT_TOKENS:]))
    assert text.isascii()
    assert text.isprintable()


def test_chat_template_marks_the_turns(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    turns = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arch": "gpt2"}, "arch"),
        ({"vocab": 256}, "vocab"),
        ({"heads": 3}, "kv_heads"),
        ({"heads": 6}, "hidden"),
        ({"head_dim": 3}, "even"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TinyModel(**wrong)
