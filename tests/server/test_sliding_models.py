"""Models with sliding windows and soft caps on a server.

The tokens of a request within its budget are those of plain SGLang; of a model that plain SGLang serves with other
attention on a CPU they are those of Transformers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sglang_freekv.testing.tiny_sliding_model import TinySlidingModel
from tools.servers import Server, random_prompt, serve

WINDOW, CHUNK, BUDGET, MAX_BUDGET, NUM_STEPS = 100, 256, 128, 2048, 32
FLAGS = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--enable-cache-report")
FREEKV = (
    *(*FLAGS, "--kv-retrieval", "freekv", "--freekv-audit", "--max-total-tokens", "16384"),
    *("--freekv-budget", str(BUDGET), "--freekv-max-budget", str(MAX_BUDGET)),
    *("--freekv-sink", "32", "--freekv-recent", "32", "--freekv-device-blocks-memory", "0.03"),
)
FULL_WIDTH = {"custom_params": {"freekv_budget": MAX_BUDGET}}
# SGLang's torch attention has windows, but no cap.
BY_PLAIN_SGLANG, BY_TRANSFORMERS = ("gemma3_text", "cohere2"), ("gemma2",)


@dataclass(frozen=True)
class Served:
    """A FreeKV server, and what its model answers with all attention that it has."""

    server: Server
    expected: Callable[[list[int]], list[int]]  # greedy tokens of a prompt


@pytest.fixture(scope="module", params=[*BY_PLAIN_SGLANG, *BY_TRANSFORMERS])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    TinySlidingModel(arch=request.param, window=WINDOW).write(model)
    with ExitStack() as stack:
        server = stack.enter_context(serve(model, folder / "freekv.log", *FREEKV))
        if request.param in BY_TRANSFORMERS:
            yield Served(server, transformers_answers(model))
        else:
            flags = (*FLAGS, "--max-total-tokens", "32768")
            plain = stack.enter_context(serve(model, folder / "plain.log", *flags))
            yield Served(server, lambda prompt: plain.generate_one(prompt, NUM_STEPS))


def transformers_answers(path: Path) -> Callable[[list[int]], list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    def answer(prompt: list[int]) -> list[int]:
        settings = {"max_new_tokens": NUM_STEPS, "do_sample": False, "eos_token_id": None}
        return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()

    return answer


def test_tokens_within_the_budget_are_those_of_all_attention(served: Served, rng: random.Random):
    prompts = [random_prompt(rng, n) for n in (1, WINDOW - 1, WINDOW + 1, 7 * WINDOW)]
    assert served.server.generate_all(prompts, NUM_STEPS, **FULL_WIDTH) == [served.expected(p) for p in prompts]


def test_a_shared_prefix_longer_than_the_window_changes_no_token(served: Served, rng: random.Random):
    prefix = random_prompt(rng, 5 * WINDOW)
    prompts = [prefix, prefix + random_prompt(rng, 3), prefix[: 4 * WINDOW] + random_prompt(rng, CHUNK + 30)]
    replies = [served.server.generate(prompt, NUM_STEPS, **FULL_WIDTH).body for prompt in prompts]
    assert [reply["output_ids"] for reply in replies] == [served.expected(prompt) for prompt in prompts]
    assert [reply["meta_info"]["cached_tokens"] for reply in replies] == [0, 480, 384]


def test_beyond_its_budget_a_long_request_is_retrieved_for_and_audited(served: Served, rng: random.Random):
    before = served.server.freekv()
    prompts = [random_prompt(rng, 30 * WINDOW), random_prompt(rng, 2 * WINDOW)]
    answers = served.server.generate_all(prompts, NUM_STEPS)
    after = served.server.freekv()
    assert [len(answer) for answer in answers] == [NUM_STEPS] * 2
    assert after["audited_batches"] > before["audited_batches"]
    assert after["audit_failures"] == after["absent_pages"] == 0
    assert after["rows"] - before["rows"] > 0, "layers that see everything choose their pages"
