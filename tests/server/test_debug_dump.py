"""A request of a running server asks for a dump of its windows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tools.servers import Server, random_prompt

NUM_STEPS = 12


def test_a_request_that_asks_is_dumped_and_its_answer_is_the_same(narrow: Server, dumps: Path, rng: random.Random):
    prompt = random_prompt(rng, 700)  # three chunks
    expected = narrow.generate_one(prompt, NUM_STEPS)
    narrow.flush()
    before = set(dumps.iterdir())
    assert narrow.generate_one(prompt, NUM_STEPS, custom_params={"freekv_dump": 4}) == expected
    (file,) = set(dumps.iterdir()) - before
    header, prompt_end, *steps = map(json.loads, file.read_text().splitlines())
    assert header["num_prompt_tokens"] == prompt_end["num_tokens"] == 700
    assert prompt_end["event"] == "prompt"
    assert [line["num_tokens"] for line in steps] == [701, 705, 709]
    for line in (prompt_end, *steps):
        for layer in line["layers"]:
            assert layer["front_absent"] == [[], []]
            for window in layer["front"]:
                # Sink, selected pages, recent, in ascending order: 128 tokens of 32.
                assert window[0] == 0 and window[-1] == line["num_pages"] - 1 and len(window) == 4
                assert window == sorted(set(window))


def test_a_dump_is_refused_where_the_server_has_no_folder_or_the_number_is_none(exact: Server, narrow: Server):
    for server, asked, message in (
        (exact, True, "--freekv-debug-dump DIR"),
        (narrow, 0, "a number of steps from 1"),
        (narrow, "all", "a number of steps from 1"),
    ):
        reply = server.generate([1, 2, 3], 2, custom_params={"freekv_dump": asked})
        assert reply.status == 400
        assert message in reply.body["error"]["message"]
