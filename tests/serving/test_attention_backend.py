"""The backend as SGLang calls it: eager, around a CUDA graph, and with what it must refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor import forward_context

from freekv_patches.runner import enable_fused_set_kv_buffer
from sglang_freekv.algorithm.decode import Decode
from sglang_freekv.algorithm.prefill import Prefill
from sglang_freekv.config import FreeKVConfig, UnsupportedConfiguration
from sglang_freekv.memory.geometry import Geometry, stored_head_dim
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.serving.attention_backend import FreeKVAttentionBackend
from sglang_freekv.serving.kv_pool import FreeKVPool
from tests.support.releases import of_release

PAGE, HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS = 32, 48, 4, 2
CONFIG = FreeKVConfig(budget_tokens=4 * PAGE, sink_tokens=PAGE, recent_tokens=PAGE)
DECODE = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False, is_idle=lambda: False)
EXTEND = SimpleNamespace(is_decode=lambda: False, is_extend=lambda: True, is_idle=lambda: False)


class Logits(LogitsProcessor):
    """SGLang's module without its groups of ranks; appends to what happens."""

    def __init__(self, happens: list[str]) -> None:
        torch.nn.Module.__init__(self)
        self.happens = happens

    def forward(self) -> None:
        self.happens.append("logits")


def make_backend(stored: int, *modules: torch.nn.Module) -> FreeKVAttentionBackend:
    """A backend for one layer whose heads are stored `stored` wide; row 1 has the slots from page 1 on."""
    geometry = Geometry(1, NUM_QO_HEADS, NUM_KV_HEADS, stored, torch.float32, key_bits=CONFIG.key_bits)
    memory = KVMemory(geometry, CONFIG, num_host_pages=40, num_blocks=200, max_requests=4, max_context=20 * PAGE)
    pool = FreeKVPool.__new__(FreeKVPool)
    pool.memory, pool.start_layer = memory, 0
    req_to_token = torch.zeros(5, 20 * PAGE, dtype=torch.int32)
    req_to_token[1] = torch.arange(PAGE, 21 * PAGE)
    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
        model=torch.nn.ModuleList([attention_layer(), *modules]),
        model_config=SimpleNamespace(context_len=8192),
    )
    memory.admit(1)
    return FreeKVAttentionBackend(runner)


def attention_layer(**changes: object) -> RadixAttention:
    layer = RadixAttention(NUM_QO_HEADS, HEAD_DIM, scaling=0.2, num_kv_heads=NUM_KV_HEADS, layer_id=0)
    vars(layer).update(changes)
    return layer


def flat_qkv(num_tokens: int) -> list[torch.Tensor]:
    return [torch.randn(num_tokens, n * HEAD_DIM) for n in (NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]


def prefill(backend: FreeKVAttentionBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    backend.begin_batch(SimpleNamespace(reqs=[of_release.request(1)], chunked_req=None))
    batch = SimpleNamespace(
        forward_mode=EXTEND,
        rids=["a"],
        batch_size=1,
        req_pool_indices=torch.tensor([1]),
        out_cache_loc=torch.arange(PAGE, PAGE + len(q)),
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[len(q)],
    )
    backend.init_forward_metadata(batch)
    out = backend.forward_extend(q, k, v, attention_layer(), batch)
    backend.end_batch(EXTEND)
    return out


def decode(
    backend: FreeKVAttentionBackend, length: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, in_graph: bool
) -> torch.Tensor:
    """The step of token `length`; before a graph, the batch is padded and its view has only some fields."""
    padding = 3 if in_graph else 0
    backend.begin_batch(SimpleNamespace(reqs=[of_release.request(1)], chunked_req=None))
    view = SimpleNamespace(
        forward_mode=DECODE,
        batch_size=1 + padding,
        req_pool_indices=torch.tensor([1, *[0] * padding]),
        seq_lens=torch.tensor([length, *[1] * padding]),
        seq_lens_cpu=torch.tensor([length, *[1] * padding]),
        out_cache_loc=torch.tensor([PAGE + length - 1]),
    )
    if in_graph:
        backend.init_forward_metadata_out_graph(view)
        backend.init_forward_metadata_in_graph(view)
    else:
        backend.init_forward_metadata(view)
    padded = [torch.cat((x, torch.randn(padding, x.shape[1]))) for x in (q, k, v)]
    out = backend.forward_decode(*padded, attention_layer(), view)[:1]
    backend.end_batch(DECODE)
    return out


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.view(len(x), -1, HEAD_DIM).transpose(0, 1) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, scale=0.2, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "around-a-graph"])
@pytest.mark.parametrize("stored", [HEAD_DIM, stored_head_dim(HEAD_DIM, "cuda")], ids=["as-is", "padded-head"])
def test_prefill_and_decode_give_full_attention_within_the_budget(stored: int, in_graph: bool) -> None:
    backend, (q, k, v) = make_backend(stored), flat_qkv(3 * PAGE + 4)
    prompt = 3 * PAGE - 2
    expected = full_attention(q, k, v)
    torch.testing.assert_close(prefill(backend, q[:prompt], k[:prompt], v[:prompt]), expected[:prompt])
    for token in range(prompt, len(q)):
        own = slice(token, token + 1)
        out = decode(backend, token + 1, q[own], k[own], v[own], in_graph)
        torch.testing.assert_close(out, expected[own])


def test_beyond_the_budget_a_padded_step_equals_an_eager_one() -> None:
    eager, graph = make_backend(HEAD_DIM), make_backend(HEAD_DIM)
    q, k, v = flat_qkv(9 * PAGE)
    for backend in (eager, graph):
        prefill(backend, q[:-8], k[:-8], v[:-8])
    for token in range(len(q) - 8, len(q)):
        own = slice(token, token + 1)
        step = (token + 1, q[own], k[own], v[own])
        torch.testing.assert_close(decode(eager, *step, in_graph=False), decode(graph, *step, in_graph=True))
    assert eager.memory.counters.as_dict() == graph.memory.counters.as_dict()


def test_capturing_a_graph_leaves_no_trace_on_running_requests() -> None:
    backend = make_backend(HEAD_DIM)
    q, k, v = flat_qkv(9 * PAGE)
    prefill(backend, q, k, v)
    memory = backend.memory
    state = [memory.windows.pages, memory.blocks.step, memory.counters.values, *memory.blocks.tables]
    before = [tensor.clone() for tensor in state]
    zeros = torch.zeros(4, dtype=torch.int64)
    padding = SimpleNamespace(
        forward_mode=DECODE,
        batch_size=4,
        req_pool_indices=zeros,
        seq_lens=zeros + backend.get_cuda_graph_seq_len_fill_value(),
        seq_lens_cpu=zeros + backend.get_cuda_graph_seq_len_fill_value(),
        out_cache_loc=zeros,
    )
    backend.init_cuda_graph_state(4, 4)
    backend.init_forward_metadata_out_graph(padding, in_capture=True)
    for _ in range(3):
        backend.forward_decode(*flat_qkv(4), attention_layer(), padding)
    assert all(tensor.equal(old) for tensor, old in zip(state, before, strict=True))


@pytest.fixture
def happens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, by name: logits, and whose side work is waited for."""
    happens: list[str] = []
    for phase in (Decode, Prefill):
        monkeypatch.setattr(phase, "finish", lambda self: happens.append(type(self).__name__))
    return happens


def test_what_runs_beside_a_forward_is_waited_for_after_its_logits(happens: list[str]) -> None:
    model = torch.nn.ModuleDict({"language_model": torch.nn.ModuleList([Logits(happens)])})
    make_backend(HEAD_DIM, model)
    model["language_model"][0]()
    assert happens == ["logits", "Decode", "Prefill"]


def test_a_model_without_logits_is_waited_for_before_its_batch_is_looked_at(happens: list[str]) -> None:
    backend = make_backend(HEAD_DIM)
    backend._dump = SimpleNamespace(begin_batch=lambda _: None, end_batch=lambda *_: happens.append("dump"))
    prefill(backend, *flat_qkv(PAGE))
    assert happens == ["Decode", "Prefill", "dump"]


def test_models_find_both_pools_and_store_nothing_in_them() -> None:
    backend = make_backend(HEAD_DIM)
    with forward_context.forward_context(forward_context.ForwardContext(backend)):
        assert isinstance(forward_context.get_token_to_kv_pool(), FreeKVPool)
        assert forward_context.get_req_to_token_pool() is backend.req_to_token_pool
        assert not enable_fused_set_kv_buffer(lambda batch: True, SimpleNamespace())


def test_graphs_for_more_requests_than_the_pools_hold_are_refused() -> None:
    with pytest.raises(RuntimeError, match="CUDA graphs for 5 requests, but the pools are for 4"):
        make_backend(HEAD_DIM).init_cuda_graph_state(5, 5)


@pytest.mark.parametrize(
    ("layer", "call", "asked"),
    [
        ({"logit_cap": 30.0}, {}, "logit_cap=30.0"),
        ({"sliding_window_size": 4095}, {}, "sliding_window_size=4095"),
        ({}, {"learned_bias": torch.zeros(4)}, "learned_bias"),
        ({}, {"save_kv_cache": False}, "keys and values that another layer or kernel has stored"),
    ],
)
def test_a_layer_that_asks_for_other_attention_ends_with_its_name(layer: dict, call: dict, asked: str) -> None:
    with pytest.raises(UnsupportedConfiguration, match=f"layer 0 asks for attention with {asked}"):
        make_backend(HEAD_DIM).forward_decode(*flat_qkv(1), attention_layer(**layer), None, **call)
