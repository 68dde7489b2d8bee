"""What the model says to prompts within the budget, computed by Hugging Face's implementation in float32.

No server takes part, so a reference cannot have the fault that it is to find. A choice between two tokens whose logits
nearly tie is left out: there rounding decides, which differs between batch sizes and between implementations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_MARGIN = 2e-2  # logits; rounding in float32 moves them by some 1e-4
_NUM_STEPS = 64
_LENGTHS = (1, 5, 31, 32, 33, 63, 64, 65, 80, 96)  # tokens: around the ends of pages
_PER_LENGTH = 6


@dataclass(frozen=True)
class Reference:
    """A prompt and its greedy continuation, up to the first near-tie."""

    prompt: list[int]
    output: list[int]
    tokenizer: AutoTokenizer

    def text(self, num_tokens: int) -> str:
        """The first tokens of the output, as the OpenAI endpoints give them."""
        return self.tokenizer.decode(self.output[:num_tokens])


@torch.no_grad()
def make_references(model_path: Path, max_tokens: int, seed: int) -> list[Reference]:
    """Prompts of several lengths, some over a common first page, and their continuations.

    Parameters
    ----------
    max_tokens : int
        Of a prompt and its output together.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rng = random.Random(f"references {seed}")
    common = rng.choices(range(256), k=max(_LENGTHS))
    references = []
    for length in _LENGTHS:
        shared = [length // 2] * (_PER_LENGTH // 2) + [0] * (_PER_LENGTH - _PER_LENGTH // 2)
        prompts = torch.tensor([common[:n] + rng.choices(range(256), k=length - n) for n in shared])
        outputs = _continue(model, prompts, min(_NUM_STEPS, max_tokens - length))
        pairs = zip(prompts.tolist(), outputs, strict=True)
        references += [Reference(prompt, output, tokenizer) for prompt, output in pairs if output]
    return references


def _continue(model: AutoModelForCausalLM, prompts: torch.Tensor, num_steps: int) -> list[list[int]]:
    """Greedy tokens of prompts `[n, length]`, each up to its first near-tie."""
    tokens, margins, cache, last = [], [], None, prompts
    for _ in range(num_steps):
        out = model(last, past_key_values=cache, use_cache=True)
        top = out.logits[:, -1].topk(2)
        cache, last = out.past_key_values, top.indices[:, :1]
        tokens.append(last[:, 0])
        margins.append(top.values[:, 0] - top.values[:, 1])
    is_clear = (torch.stack(margins, 1) > _MARGIN).long().cumprod(1).sum(1).tolist()  # tokens before a near-tie
    return [row[:n] for row, n in zip(torch.stack(tokens, 1).tolist(), is_clear, strict=True)]
