"""`sgl.Engine` with FreeKV: in float32 on two ranks it is the server's equal, in bfloat16 as close as bfloat16 is."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tools.servers import Server, random_prompt, stop
from tools.zygote.client import start

SCRIPT = Path(__file__).with_name("engine_script.py")
CHILDREN = 3  # of an engine on two ranks: a scheduler for each, and a detokenizer
NUM_STEPS = 64
GREEDY = {"temperature": 0, "max_new_tokens": NUM_STEPS, "ignore_eos": True}
BUDGET_COVERS, BUDGET_SELECTS = 1024, 128  # the second as on the server "narrow", like sink and recent
COMMON = {
    "kv_retrieval": "freekv",
    "freekv_sink": 32,
    "freekv_recent": 32,
    "freekv_audit": True,
    "max_running_requests": 8,
    "max_total_tokens": 4096,
    "log_level": "warning",
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two stay within the smaller budget to the last step; the others exceed it in between, or from the first."""
    rng = random.Random("engine")
    return [random_prompt(rng, n) for n in (3, 60, 130, 250, 600)]


@pytest.fixture(scope="module")
def engines(
    model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict] | list[list[dict]]]:
    """Replies of two engines, one per dtype."""
    folder = tmp_path_factory.mktemp("engine")
    jobs = {
        "float32": {
            "engine": {
                **COMMON,
                "model_path": str(model),
                "dtype": "float32",
                "freekv_budget": BUDGET_SELECTS,
                "tp_size": 2,
            },
            "requests": [{"input_ids": prompts, "sampling_params": GREEDY}],
        },
        "bfloat16": {
            "engine": {
                **COMMON,
                "model_path": str(model),
                "dtype": "bfloat16",
                "freekv_budget": BUDGET_COVERS,
                "page_size": 16,
            },
            "requests": [
                {
                    "input_ids": prompts[-1],
                    "sampling_params": {**GREEDY, "custom_params": {"freekv_budget": budget}},
                    "return_logprob": True,
                }
                for budget in (BUDGET_COVERS, BUDGET_SELECTS)
            ],
        },
    }
    return {name: run(job, folder / f"{name}.json") for name, job in jobs.items()}


def run(job: dict, path: Path) -> list:
    """The replies of an engine in a process of its own."""
    path.write_text(json.dumps(job))
    log, environment = path.with_suffix(".log"), os.environ | {"OMP_NUM_THREADS": "1"}
    process = start([str(SCRIPT), str(path)], log, environment, CHILDREN)
    try:
        assert process.wait(timeout=300) == 0, log.read_text()[-4000:]
    finally:
        stop(process)
    return json.loads(path.with_suffix(".replies.json").read_text())


def test_two_ranks_give_the_tokens_of_the_server(engines, narrow: Server, prompts: list[list[int]]):
    by_two_ranks = [reply["output_ids"] for reply in engines["float32"][0]]
    assert by_two_ranks == narrow.generate_all(prompts, NUM_STEPS)


def test_two_ranks_give_the_tokens_of_plain_sglang_within_the_budget(engines, plain: Server, prompts: list[list[int]]):
    within = [i for i, prompt in enumerate(prompts) if len(prompt) + NUM_STEPS <= BUDGET_SELECTS]
    assert len(within) == 2
    expected = plain.generate_all([prompts[i] for i in within], NUM_STEPS)
    assert [engines["float32"][0][i]["output_ids"] for i in within] == expected


def logprob_error(model: Path, prompt: list[int], reply: dict, dtype: torch.dtype | None = None) -> float:
    """Root mean square, against the model in float32, of the log-probabilities of a reply's tokens.

    They are those of the reply, or, given a dtype, those of the model in it.
    """
    tokens = torch.tensor(reply["output_ids"])

    @torch.no_grad()
    def logprobs(dtype: torch.dtype) -> torch.Tensor:
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        logits = reference(torch.tensor([prompt + reply["output_ids"]])).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    if dtype is None:
        given = torch.tensor([logprob for logprob, *_ in reply["meta_info"]["output_token_logprobs"]])
    else:
        given = logprobs(dtype)
    return float((given - logprobs(torch.float32)).square().mean().sqrt())


def test_logprobs_in_bfloat16_are_within_its_rounding(engines, model: Path, prompts: list[list[int]]):
    exact, selected = engines["bfloat16"]
    rounding = logprob_error(model, prompts[-1], exact, torch.bfloat16)
    assert logprob_error(model, prompts[-1], exact) < 2 * rounding
    # The measure tells: a budget that does not cover the request is seen.
    assert logprob_error(model, prompts[-1], selected) > 4 * rounding
