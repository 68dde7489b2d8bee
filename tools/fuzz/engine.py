"""FreeKV behind SGLang's pools, radix tree and attention backend, without a server around them."""

from __future__ import annotations

import math
from types import SimpleNamespace

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from torch.nn import ModuleList

from sglang_freekv.cpu.allocator import CpuPagedAllocator
from sglang_freekv.memory.plan import MemoryPlan
from sglang_freekv.serving.attention_backend import FreeKVAttentionBackend
from sglang_freekv.serving.kv_pool import FreeKVPool, FreeKVReqToTokenPool
from sglang_freekv.serving.radix_cache import create_radix_cache
from tools.fuzz.ledger import Ledger
from tools.fuzz.setups import MAX_TOKENS, PAGE_SIZE, Setup
from tools.fuzz.texts import values_for


class Engine:
    """The parts that the plug-in puts into SGLang, built as it builds them.

    Attributes
    ----------
    memory : KVMemory
    rows : FreeKVReqToTokenPool
        The request table.
    allocator, tree
        SGLang's, of token slots and of prefixes.
    backend : FreeKVAttentionBackend
    layers : ModuleList of RadixAttention
        The model: attention and nothing else.
    values : Values
        What a model would compute.
    ledger : Ledger
    """

    def __init__(self, setup: Setup) -> None:
        g, c = setup.geometry, setup.config
        self.setup = setup
        plan = MemoryPlan(g, c, setup.num_pages, setup.blocks, setup.max_requests, *[0] * 6, request_bytes=0)
        pool = FreeKVPool(plan, MAX_TOKENS, "cpu", 0, g.num_layers)
        self.memory = pool.memory
        self.memory.counters.steps = setup.first_step
        self.memory.blocks.step.fill_(setup.first_step)
        self.rows = FreeKVReqToTokenPool(c, setup.max_requests, MAX_TOKENS, "cpu")
        self.allocator = CpuPagedAllocator(plan.num_tokens, PAGE_SIZE, g.dtype, "cpu", pool, need_sort=False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE_SIZE,
        )
        self.tree = create_radix_cache(
            SimpleNamespace(disable_radix_cache=False, effective_chunked_prefill_size=None, params=params)
        )
        scale = 1 / math.sqrt(g.head_dim)
        shape = g.num_qo_heads, g.head_dim, scale, g.num_kv_heads
        self.layers = ModuleList(RadixAttention(*shape, layer_id=number) for number in range(g.num_layers))
        self.backend = FreeKVAttentionBackend(
            SimpleNamespace(
                token_to_kv_pool=pool,
                req_to_token_pool=self.rows,
                model=self.layers,
                model_config=SimpleNamespace(context_len=self.rows.max_context_len),
            )
        )
        self.values = values_for(g)
        self.ledger = Ledger(self.memory, self.values)
