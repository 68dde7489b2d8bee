"""What operators combine with retrieval: priorities, sessions, other weights (`docs/features.md`)."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_freekv.testing.tiny_model import TinyModel
from tools.servers import Server, random_prompt, serve

BUDGET = 256  # requests within it repeat token by token, however they are interrupted
FLAGS = (
    *("--dtype", "float32", "--chunked-prefill-size", "256", "--kv-retrieval", "freekv", "--freekv-audit"),
    *("--freekv-budget", str(BUDGET), "--freekv-sink", "32", "--freekv-recent", "32", "--enable-cache-report"),
    *("--freekv-host-memory", "0.05", "--freekv-device-blocks-memory", "0.0235"),
)
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def one_by_one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one request at a time, which a more urgent one may displace."""
    log = tmp_path_factory.mktemp("logs") / "log"
    priorities = ("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "1")
    with serve(model, log, *FLAGS, *priorities, "--max-running-requests", "1") as server:
        yield server


def test_an_urgent_request_displaces_another_and_both_get_their_tokens(one_by_one: Server, rng: random.Random):
    slow, urgent = random_prompt(rng, 60), random_prompt(rng, 40)
    expected = [one_by_one.generate_one(slow, 180), one_by_one.generate_one(urgent, 8)]
    one_by_one.flush()
    ended: list[str] = []
    replies = {}

    def send(name: str, prompt: list[int], num_tokens: int, priority: int) -> None:
        body = {"input_ids": prompt, "sampling_params": {**GREEDY, "max_new_tokens": num_tokens}, "priority": priority}
        replies[name] = one_by_one.request("/generate", body).body
        ended.append(name)

    first = threading.Thread(target=send, args=("slow", slow, 180, 0))
    first.start()
    one_by_one.wait_for_decoding(5)
    send("urgent", urgent, 8, 10)
    first.join()
    assert ended == ["urgent", "slow"]
    assert replies["slow"]["meta_info"]["num_retractions"] > 0
    assert [replies[name]["output_ids"] for name in ("slow", "urgent")] == expected


def test_a_turn_of_a_session_continues_the_one_before(one_by_one: Server, rng: random.Random):
    first, second = random_prompt(rng, 100), random_prompt(rng, 20)
    opened = one_by_one.request("/open_session", {"capacity_of_str_len": 1000}).body

    def turn(prompt: list[int], after: str | None) -> dict:
        session = {"id": opened} if after is None else {"id": opened, "rid": after}
        body = {"input_ids": prompt, "sampling_params": {**GREEDY, "max_new_tokens": 16}, "session_params": session}
        return one_by_one.request("/generate", body).body

    before = turn(first, None)
    after = turn(second, before["meta_info"]["id"])
    assert after["meta_info"]["cached_tokens"] > 0
    one_by_one.flush()
    assert one_by_one.generate_one(first + before["output_ids"] + second, 16) == after["output_ids"]
    assert one_by_one.request("/close_session", {"session_id": opened}).status == 200


def test_other_weights_leave_no_kv_of_those_before(one_by_one: Server, rng: random.Random, model: Path, tmp_path: Path):
    TinyModel(layers=3, dtype="float32", seed=7).write(tmp_path)
    prompt = random_prompt(rng, 200)

    def update(folder: Path) -> list[int]:
        reply = one_by_one.request("/update_weights_from_disk", {"model_path": str(folder)})
        assert reply.body["success"], reply
        assert one_by_one.freekv()["tree_tokens"] == 0
        return one_by_one.generate_one(prompt, 16)

    original = one_by_one.generate_one(prompt, 16)
    other = update(tmp_path)
    assert other != original
    one_by_one.flush()
    assert one_by_one.generate_one(prompt, 16) == other
    assert update(model) == original
