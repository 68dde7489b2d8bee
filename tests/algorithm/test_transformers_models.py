"""The engine as the attention of small models of Transformers: their greedy tokens where the budget covers everything.

So windows, caps and sinks are held against those who define them, and not against another reading of theirs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sglang_freekv.algorithm.engine import build_engine
from sglang_freekv.algorithm.inputs import DecodeInput, ExtendInput
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.testing.tiny_sliding_model import TinySlidingModel

WINDOW, NUM_STEPS, MAX_TOKENS, ROW = 100, 48, 1024, 1
ARCHITECTURES = ("gemma2", "gemma3_text", "gpt_oss", "cohere2", "exaone4", "mistral")


class EngineModel:
    """A model whose attention is the engine's, for one request."""

    def __init__(self, path: Path, config: FreeKVConfig) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        text = self.model.config
        types = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        geometry = Geometry(
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            torch.float32,
            key_bits=2,
            sliding_windows=tuple(text.sliding_window if t == "sliding_attention" else None for t in types),
            logit_cap=getattr(text, "attn_logit_softcapping", None) or 0.0,
        )
        sizes = {"num_host_pages": MAX_TOKENS // 32 + 1, "num_blocks": 200, "max_requests": 1}
        self.memory = KVMemory(geometry, config, **sizes, max_context=MAX_TOKENS)
        self.memory.admit(ROW)
        self.decoder, self.prefiller = build_engine(self.memory)
        self.req_to_token = torch.arange(2 * MAX_TOKENS).view(2, -1).int() - MAX_TOKENS + 32  # page 0 is padding
        ALL_ATTENTION_FUNCTIONS.register("engine", self._attend)
        self.model.config._attn_implementation = "engine"

    def _attend(self, module, query, key, value, attention_mask, scaling, s_aux=None, **_):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        sinks = None if s_aux is None else s_aux.detach().float()
        out = self._phase.run(module.layer_idx, q, k, v, scaling, sinks)
        return out[None], None

    def _forward(self, tokens: list[int], first: int) -> int:
        positions = torch.arange(first, first + len(tokens))[None]
        logits = self.model(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits
        self._phase.finish()
        return int(logits[0, -1].argmax())

    @torch.no_grad()
    def answer(self, prompt: list[int], chunk: int, num_steps: int) -> list[int]:
        """Greedy tokens; the prompt is read in chunks."""
        rows = torch.tensor([ROW])
        for first in range(0, len(prompt), chunk):
            tokens = prompt[first : first + chunk]
            last = first + len(tokens)
            slots = self.req_to_token[ROW, first:last].long()
            is_final = [last == len(prompt)]
            self.prefiller.plan(ExtendInput(rows, slots, self.req_to_token, [ROW], [first], [len(tokens)], is_final))
            self._phase = self.prefiller
            answer = [self._forward(tokens, first)]
        for length in range(len(prompt) + 1, len(prompt) + num_steps):
            slots = self.req_to_token[ROW, length - 1 : length].long()
            lens = torch.tensor([length])
            self.decoder.plan(DecodeInput(rows, lens, slots, self.req_to_token, [ROW], [length]))
            self._phase = self.decoder
            answer.append(self._forward(answer[-1:], length - 1))
        return answer


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    TinySlidingModel(arch=request.param, window=WINDOW).write(out)
    return out


@pytest.mark.parametrize("num_tokens", [WINDOW - 1, 7 * WINDOW])
def test_greedy_tokens_are_those_of_the_model_s_own_attention(checkpoint: Path, num_tokens: int) -> None:
    prompt = torch.randint(256, (num_tokens,)).tolist()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_STEPS, do_sample=False, eos_token_id=None)
    config = FreeKVConfig(budget_tokens=MAX_TOKENS, arena_tokens=96)
    answer = EngineModel(checkpoint, config).answer(prompt, chunk=256, num_steps=NUM_STEPS)
    assert answer == expected[0, num_tokens:].tolist()
    assert len(answer) == NUM_STEPS and len(set(answer)) > 4, "a model that repeats itself tells nothing"
