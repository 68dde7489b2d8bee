"""The requests of a soak, drawn from a seed: rounds of mixed traffic, and bursts that outgrow the host store."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

from tools.soak.references import Reference
from tools.soak.settings import BUDGETS, HOST_TOKENS, MAX_PROMPT_TOKENS
from tools.soak.wrong_requests import WRONG, WrongRequest

Ending = Literal["length", "abort", "hang up", "leave"]
Surface = Literal["stream", "whole", "openai"]

# Of one round. Exact: within its budget, its output is compared.
MIXED = {"exact": 14, "long": 14, "abort": 4, "hang up": 3, "leave": 2, "oversize": 1, "wrong": 5, "flush": 1}
BURST = {"exact": 8, "greedy": 22}
_MAX_NEW_TOKENS = 256
_DOCUMENT_WEIGHTS = (16, 4, 2, 1)  # how often requests begin as each document does


@dataclass(frozen=True)
class Job:
    """A request and how it ends."""

    kind: str
    prompt: list[int]
    max_new_tokens: int
    budget: int  # tokens
    ending: Ending = "length"
    patience: int = 0  # answers in the stream that the client awaits before it ends the request early
    surface: Surface = "stream"
    reference: Reference | None = None  # of a request within its budget


Action = Job | WrongRequest | Literal["flush"]


class Traffic:
    """Rounds of requests; equal seeds give equal rounds."""

    def __init__(self, references: list[Reference], seed: int) -> None:
        self._rng = random.Random(seed)
        self._references = references
        self._documents = [self._tokens(MAX_PROMPT_TOKENS) for _ in _DOCUMENT_WEIGHTS]

    def next_round(self, number: int) -> list[Action]:
        """Actions in the order in which clients take them: mixed ones in even rounds, a burst in odd ones."""
        counts = BURST if number % 2 else MIXED
        actions = [self._draw(kind) for kind, count in counts.items() for _ in range(count)]
        self._rng.shuffle(actions)
        return actions

    def _draw(self, kind: str) -> Action:
        rng = self._rng
        match kind:
            case "flush":
                return "flush"
            case "wrong":
                return rng.choice(WRONG)
            case "exact":
                return self._exact()
            case "oversize":
                return Job(kind, self._tokens(HOST_TOKENS + 1 + rng.randrange(1000)), 8, BUDGETS[0])
            case "greedy":  # for memory: admitted in haste, they outgrow the store and some are retracted
                return replace(self._long(256, 2048), kind=kind, max_new_tokens=_MAX_NEW_TOKENS)
        job = self._long(1, MAX_PROMPT_TOKENS)
        if kind == "long":
            return job
        surface = "whole" if kind == "leave" else "stream"
        return replace(
            job,
            kind=kind,
            ending=kind,
            max_new_tokens=_MAX_NEW_TOKENS,
            patience=rng.choice((0, 1, 20)),
            surface=surface,
        )

    def _exact(self) -> Job:
        rng = self._rng
        reference = rng.choice(self._references)
        num_new = rng.randint(1, len(reference.output))
        budget = rng.choice([b for b in BUDGETS if b >= len(reference.prompt) + num_new])
        surface = rng.choice(("stream", "whole", "openai"))
        return Job("exact", reference.prompt, num_new, budget, surface=surface, reference=reference)

    def _long(self, least: int, most: int) -> Job:
        """A prompt of log-uniform length; two thirds begin as a document does, by half or wholly but for a token."""
        rng = self._rng
        length = self._log_uniform(least, most)
        shared = rng.choice((0, length // 2, length - 1))
        document = rng.choices(self._documents, _DOCUMENT_WEIGHTS)[0]
        prompt = document[:shared] + self._tokens(length - shared)
        surface = rng.choice(("stream", "whole"))
        return Job("long", prompt, self._log_uniform(1, _MAX_NEW_TOKENS), rng.choice(BUDGETS), surface=surface)

    def _log_uniform(self, least: int, most: int) -> int:
        return round(math.exp(self._rng.uniform(math.log(least), math.log(most))))

    def _tokens(self, count: int) -> list[int]:
        return self._rng.choices(range(256), k=count)
