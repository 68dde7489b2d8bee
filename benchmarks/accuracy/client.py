"""Play sessions against a server, a batch of them turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from benchmarks import footprint
from benchmarks.accuracy.tasks.session import Outputs, Session, Turn
from benchmarks.server import Chunk, Server
from sglang_freekv.config import BUDGET_PARAM

COUNTERS = ("recalled_bytes", "rows", "flagged_rows", "hits", "misses", "absent_pages", *footprint.COUNTERS)


class Generation(NamedTuple):
    """What a batch of requests came back with."""

    outputs: list[list[int]]  # tokens of each request
    decoded: int  # tokens, over the batch, in `seconds`
    seconds: float  # from the moment when every request had its first token


class Played(NamedTuple):
    """A batch of sessions from the first turn to the last."""

    outputs: list[Outputs]  # of each session
    generated: int  # tokens
    decoded: int  # of them, in `seconds`
    seconds: float  # of decoding: from each turn's last first token on, so without prefill


class Client(Protocol):
    """A server to play against."""

    def generate(
        self, prompts: list[list[int]], turns: Sequence[Turn], budget: int | None, cache: str | None
    ) -> Generation:
        """Answer prompts that arrive together, each with its turn's sampling.

        Parameters
        ----------
        budget : int, tokens, or None for the server's own
        cache : str, optional
            Requests see prefixes in the cache of those with the same name only.
        """
        ...

    def counters(self) -> dict[str, int] | None:
        """`COUNTERS` since start-up; None where the server has none."""
        ...


class ServerClient:
    """A SGLang server, started with ``--incremental-streaming-output``."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def generate(
        self, prompts: list[list[int]], turns: Sequence[Turn], budget: int | None, cache: str | None
    ) -> Generation:
        params = {} if budget is None else {"custom_params": {BUDGET_PARAM: budget}}
        sampling = [
            {
                "max_new_tokens": turn.max_new_tokens,
                "temperature": turn.temperature,
                "ignore_eos": turn.ignore_eos,
                **params,
            }
            for turn in turns
        ]
        fields = {} if cache is None else {"extra_key": [cache] * len(prompts)}
        return collect(self._server.stream(prompts, sampling, **fields), len(prompts))

    def counters(self) -> dict[str, int] | None:
        state = self._server.info()["internal_states"][0].get("freekv")
        return state and {name: state[name] for name in COUNTERS}


def collect(chunks: Sequence[Chunk], num_requests: int) -> Generation:
    """Put outputs together, and time their decoding: what came after every request had its first token."""
    outputs: list[list[int]] = [[] for _ in range(num_requests)]
    waiting, early, start, end = set(range(num_requests)), 0, 0.0, 0.0
    for chunk in chunks:
        outputs[chunk.request] += chunk.output_ids
        end = chunk.seconds
        if waiting:
            waiting.discard(chunk.request)
            early, start = sum(map(len, outputs)), end
    if waiting:
        raise RuntimeError(f"no tokens came back for requests {sorted(waiting)} of {num_requests}")
    return Generation(outputs, sum(map(len, outputs)) - early, end - start)


def play(client: Client, sessions: Sequence[Session], budget: int | None, cache: str | None = None) -> Played:
    """Play sessions at once, turn by turn: a turn's prompt is all tokens of its session so far, and the turn's own."""
    texts: list[list[int]] = [[] for _ in sessions]
    outputs: list[Outputs] = [[] for _ in sessions]
    generated, decoded, seconds = 0, 0, 0.0
    for number in range(max(len(session.turns) for session in sessions)):
        playing = [i for i, session in enumerate(sessions) if number < len(session.turns)]
        turns = [sessions[i].turns[number] for i in playing]
        for i, turn in zip(playing, turns, strict=True):
            texts[i] += turn.prompt
        answer = client.generate([list(texts[i]) for i in playing], turns, budget, cache)
        for i, output in zip(playing, answer.outputs, strict=True):
            texts[i] += output
            outputs[i].append(output)
            generated += len(output)
        decoded, seconds = decoded + answer.decoded, seconds + answer.seconds
    return Played(outputs, generated, decoded, seconds)


def read_documents(client: Client, sessions: Sequence[Session], budget: int | None, cache: str | None = None) -> None:
    """Put the first prompts into the prefix cache, one after the other: a document that they share is read once."""
    for session in sessions:
        first = session.turns[0]
        client.generate([first.prompt], [first._replace(max_new_tokens=1)], budget, cache)


def scores(session: Session, outputs: Outputs) -> list[list[float] | None]:
    """One value per reference for each turn; None where a turn is not scored."""
    return [
        None if turn.score is None else [float(value) for value in turn.score(outputs[: number + 1])]
        for number, turn in enumerate(session.turns)
    ]
