"""No request reads or disturbs another's KV: on its pages, blocks or row, or through salts, adapters, priorities."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from freekv_kernels import REFERENCE
from random_traces import make_trace
from reference_checks import ReferenceChecks, Request
from servers import Server, assert_pages_are_whole, random_prompt, serve
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.geometry import Geometry
from simulated_requests import PAGE, SimulatedEngine

# The memory side: whose values attention sees

GEOMETRY = Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
CONFIG = FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE, arena_tokens=4 * PAGE)
_NUM_PAGES = 25  # two requests of the largest kind: every page has many owners
_TOLERANCE = 1e-5  # of a weighted mean of equal values; one token of another owner shifts it by more than 1e-3


class Owners:
    """Requests whose values are all the same number, each its own: any other number in an output is another's."""

    def __init__(self, engine: SimulatedEngine, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)
        self.value: dict[Request, float] = {}
        self.owners_of_page: dict[int, set[float]] = {}

    def start(self) -> None:
        number = float(1000 * (len(self.value) + 1))
        prompt_tokens = self.random.randint(1, 10 * PAGE)
        trace = make_trace(GEOMETRY, 12 * PAGE, self.random.getrandbits(32))
        request = self.engine.start(replace(trace, v=torch.full_like(trace.v, number)), prompt_tokens)
        self.value[request] = number
        while not request.is_decoding:
            left = request.prompt_tokens - request.length
            (out,) = self.engine.prefill([(request, self.random.randint(1, left))])
            self._assert_own(request, out)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            for token in self.engine.decode():
                self._assert_own(token.request, torch.stack(token.outputs))

    def leave(self, request: Request) -> None:
        for page in request.pages:
            self.owners_of_page.setdefault(page, set()).add(self.value[request])
        self.engine.leave(request)

    def _assert_own(self, request: Request, out: torch.Tensor) -> None:
        own = self.value[request]
        shown = out.flatten()[(out.flatten() / own - 1).abs().argmax()].item()
        assert abs(shown / own - 1) < _TOLERANCE, f"the owner of {own} is shown {shown}"


def live(owners: Owners, num_owners: int) -> None:
    """Two requests run at a time; the older makes room for the next."""
    for _ in range(num_owners):
        owners.start()
        owners.decode(owners.random.randint(1, PAGE // 2))
        if len(owners.engine.requests) == 2:
            owners.leave(owners.engine.requests[0])


@pytest.mark.parametrize(
    "settings",
    [{}, {"key_bits": 0, "tau": 2.0}, {"dense_layers": (0,), "tau": -1.0}, {"budget_tokens": 16 * PAGE}],
    ids=str,
)
def test_a_page_of_many_owners_shows_each_its_own_values(settings: dict):
    config = replace(CONFIG, max_budget_tokens=None, **settings)
    owners = Owners(SimulatedEngine(GEOMETRY, config, max_requests=2, num_pages=_NUM_PAGES), seed=1)
    live(owners, 8)
    assert max(map(len, owners.owners_of_page.values())) >= 3, "pages were not reused"


class Unchecked(ReferenceChecks):
    """Compares nothing with the reference, so that the values have to show what is wrong."""

    def invariants(self, *_) -> None: ...
    def output(self, *_) -> None: ...
    def windows(self, *_) -> None: ...
    def flags(self, *_) -> tuple[int, int]:
        return 0, 0


def test_the_values_show_a_slot_that_is_not_the_owners():
    """From some step on nothing is written: the new token's slot keeps what the page's earlier owner wrote."""
    is_broken = False

    def append_tokens(*args) -> None:
        if not is_broken:
            REFERENCE.append_tokens(*args)

    ops = REFERENCE._replace(append_tokens=append_tokens)
    engine = SimulatedEngine(GEOMETRY, CONFIG, max_requests=2, num_pages=_NUM_PAGES, ops=ops)
    engine.checks = Unchecked(engine.memory, engine.rule)
    owners = Owners(engine, seed=1)
    live(owners, 8)
    is_broken = True
    with pytest.raises(AssertionError, match=r"the owner of \d+\.0 is shown \d"):
        live(owners, 8)


# The server: what a request is answered

NUM_STEPS = 16
_ROUNDING = 1e-3  # nats in float32; a value of somebody else's moves them by far more
STORE_TOKENS = 4096
ADAPTERS = ("first", "second")
FLAGS = (
    "--dtype float32 --chunked-prefill-size 256 --kv-retrieval freekv --freekv-audit --freekv-budget 128 "
    "--freekv-sink 32 --freekv-recent 32 --freekv-group-pooling mean "
    f"--max-total-tokens {STORE_TOKENS} --freekv-device-blocks-memory 0.003 "  # the windows of four requests
    "--enable-priority-scheduling --enable-cache-report --enable-lora --lora-backend torch_native --max-lora-rank 8"
).split()


def write_adapter(folder: Path, model: Path, seed: int) -> None:
    """A LoRA adapter that changes queries and values."""
    config = json.loads((model / "config.json").read_text())
    generator, rank = torch.Generator().manual_seed(seed), 8
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in (("q_proj", config["num_attention_heads"]), ("v_proj", config["num_key_value_heads"])):
            for part, shape in (("A", (rank, config["hidden_size"])), ("B", (heads * config["head_dim"], rank))):
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight"
                weights[key] = 0.1 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    modules = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(modules))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("isolation")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / name, model, seed)
    loras = [f"{name}={folder / name}" for name in ADAPTERS]
    with serve(model, folder / "log", *FLAGS, "--lora-paths", *loras) as server:
        yield server


def ask(server: Server, prompt: list[int], num_steps: int = NUM_STEPS, **fields) -> dict:
    params = {"temperature": 0, "max_new_tokens": num_steps, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, **fields}
    reply = server.request("/generate", body)
    assert reply.status == 200, reply
    return reply.body


class Said(NamedTuple):
    """What a request was answered."""

    tokens: list[int]
    logprobs: list[float]


def said(reply: dict) -> Said:
    logprobs = [logprob for logprob, *_ in reply["meta_info"]["output_token_logprobs"]]
    return Said(reply["output_ids"], logprobs)


def cached(reply: dict) -> int:
    return reply["meta_info"]["cached_tokens"]


_RNG = random.Random("isolation")
PROMPTS = [random_prompt(_RNG, n) for n in (40, 100, 300, 1200)]  # within the budget, and over it
INTRUDERS = [random_prompt(_RNG, 1000 + 7 * i) for i in range(5)]  # more than the store has


@pytest.fixture(scope="module")
def fresh(server: Server) -> list[Said]:
    """Answers to `PROMPTS`, one after the other, on a store that nobody has written before them."""
    assert server.freekv()["tree_tokens"] == 0
    answers = [said(ask(server, prompt)) for prompt in PROMPTS]
    return [answer._replace(logprobs=pytest.approx(answer.logprobs, abs=_ROUNDING)) for answer in answers]


def intrude(server: Server) -> None:
    """Fill every page and every block with others' values."""
    for prompt in INTRUDERS:
        ask(server, prompt)


def test_on_pages_of_others_the_answer_is_that_of_a_fresh_server(server: Server, fresh: list[Said]):
    intrude(server)
    assert server.freekv()["tree_evicted_tokens"] > 0
    # Pages of the tree are evicted for it; then all are handed out again, with what was left in them.
    assert [said(ask(server, prompt)) for prompt in PROMPTS] == fresh
    intrude(server)
    server.flush()
    assert [said(ask(server, prompt)) for prompt in PROMPTS] == fresh


def test_beside_others_the_tokens_are_those_of_a_fresh_server(server: Server, fresh: list[Said]):
    server.flush()
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(ask, server, prompt, 64) for prompt in INTRUDERS[:3]]
        replies = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
        assert all(other.result() for other in others)
    assert [said(reply) for reply in replies] == fresh


def test_a_prefix_is_found_under_its_own_salt_only(server: Server, fresh: list[Said]):
    server.flush()
    prompt, known = PROMPTS[2], len(PROMPTS[2]) // PAGE * PAGE
    for salt in ("mine", None, "yours", "", "min", "mine "):
        first, second = (ask(server, prompt, extra_key=salt) for _ in range(2))
        # An empty salt is none.
        assert cached(first) == (known if salt == "" else 0), salt
        assert cached(second) == known
        assert [said(first), said(second)] == [fresh[2]] * 2
    # Each salt has pages of its own.
    assert server.freekv()["tree_tokens"] >= 5 * known


def test_the_openai_salt_separates_as_well(server: Server):
    server.flush()
    prompt = random_prompt(random.Random("salt"), 200)

    def cached_tokens(**salt: str) -> int:
        reply = server.request("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 4, **salt})
        details = reply.body["usage"]["prompt_tokens_details"]
        return details["cached_tokens"] if details else 0

    salts = [{"cache_salt": "a"}, {"cache_salt": "b"}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {}]
    assert [cached_tokens(**salt) for salt in salts] == [0, 0, 0, 192, 192, 192]


def test_adapters_share_nothing_and_answer_as_alone(server: Server, fresh: list[Said]):
    prompt, names = PROMPTS[2], (None, *ADAPTERS)
    alone = {}
    for name in names:
        server.flush()
        alone[name] = ask(server, prompt, lora_path=name)["output_ids"]
    assert len(set(map(tuple, alone.values()))) == len(names), "the adapters change nothing"
    assert alone[None] == fresh[2].tokens
    server.flush()
    for again in (False, True):
        for name in names:
            reply = ask(server, prompt, lora_path=name)
            assert reply["output_ids"] == alone[name]
            assert (cached(reply) > 0) == again
    server.flush()
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: ask(server, prompt, lora_path=name), names))
    assert {name: reply["output_ids"] for name, reply in zip(names, together, strict=True)} == alone


def test_a_request_that_others_overtake_is_answered_as_alone(server: Server):
    """Four of low priority run, and more of a high one come: some of the four are retracted for them."""
    rng = random.Random("priority")
    prompts = [random_prompt(rng, 150 + i) for i in range(4)]
    server.flush()
    alone = [ask(server, prompt, 100)["output_ids"] for prompt in prompts]
    server.flush()
    with ThreadPoolExecutor(12) as pool:
        low = [pool.submit(ask, server, prompt, 100, priority=0) for prompt in prompts]
        server.wait_for_decoding(8)
        high = [pool.submit(ask, server, random_prompt(rng, 200), 8, priority=100) for _ in range(4)]
        assert all(request.result() for request in high)
        replies = [request.result() for request in low]
    assert [reply["output_ids"] for reply in replies] == alone
    assert sum(reply["meta_info"].get("num_retractions", 0) for reply in replies) > 0
    assert_pages_are_whole(server)
