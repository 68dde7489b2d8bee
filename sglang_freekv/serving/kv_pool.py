"""SGLang's view of the KV memory: its token pool and its request pool."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

from sglang.srt.mem_cache.memory_pool import KVCache, ReqToTokenPool

from sglang_freekv.algorithm.selectors import SELECTORS
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.kv_memory import KVMemory
from sglang_freekv.memory.plan import MemoryPlan
from sglang_freekv.releases import release
from sglang_freekv.request_params import request_budget_tokens, request_mass

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)


class FreeKVPool(KVCache):
    """The token pool whose slots are slots of the host store.

    SGLang never dereferences a slot; only the attention backend does, through `memory`. Nothing here hands out a
    token-major buffer, as none exists.
    """

    def __init__(self, plan: MemoryPlan, max_context: int, device: str, start_layer: int, end_layer: int) -> None:
        g = plan.geometry
        super().__init__(
            plan.num_tokens,
            g.page_size,
            g.dtype,
            g.num_layers,
            device,
            enable_memory_saver=False,
            start_layer=start_layer,
            end_layer=end_layer,
        )
        self.plan, self.baseline = plan, SELECTORS[plan.config.selector_name].baseline
        self.memory = KVMemory(
            g,
            plan.config,
            num_host_pages=plan.num_pages + 1,
            num_blocks=plan.num_blocks,
            max_requests=plan.max_requests,
            max_context=max_context,
            device=device,
        )
        logger.info(plan.describe())
        if self.baseline is not None:
            logger.info(f"FreeKV selects by a baseline, for comparison: {self.baseline}")
        self._finalize_allocation_log(plan.num_tokens)

    def get_kv_size_bytes(self) -> int:
        return sum(self.memory.device_bytes().values())

    def report(self) -> dict[str, Any]:
        """What `/server_info` publishes, sizes in bytes: JSON only."""
        g, memory = self.plan.geometry, self.memory
        return {
            **self.plan.report(),
            "baseline": self.baseline,
            **memory.counters.as_dict(),
            **memory.device_bytes(),
            "host_bytes": memory.host.nbytes,
            "host_tokens": self.plan.num_tokens,
            "device_blocks": memory.blocks.capacity,
            "device_blocks_used": memory.blocks.num_resident,
            "max_running_requests": self.plan.max_requests,
            "full_kv_bytes_per_token": g.token_bytes,
            "device_bytes_per_request": self.plan.request_bytes,
            "block_bytes": g.block_bytes,
        }

    def _no_buffer(self, layer_id: int) -> NoReturn:
        raise NotImplementedError(
            "FreeKV keeps no token-major KV buffer: the host store is head-major, only its attention backend reads it"
        )

    get_key_buffer = get_value_buffer = get_kv_buffer = _no_buffer

    def set_kv_buffer(self, layer, loc, cache_k, cache_v) -> NoReturn:
        self._no_buffer(layer.layer_id)


class FreeKVReqToTokenPool(ReqToTokenPool):
    """The request table; a request that comes to a row starts the row's window state.

    A row may outlive its request: with ``--enable-streaming-session`` the next turn of a session comes to the row of
    the last one. And a request comes to its row again with each chunk of its prompt.
    """

    def __init__(self, config: FreeKVConfig, size: int, max_context_len: int, device: str) -> None:
        super().__init__(size, max_context_len, device, enable_memory_saver=False)
        self._config = config
        self._owners: WeakValueDictionary[int, Req] = WeakValueDictionary()  # by row
        self.memory: KVMemory | None = None  # set by the attention backend, as the token pool is built after this one

    def alloc(self, reqs: list[Req]) -> list[int] | None:
        rows = super().alloc(reqs)
        for row, req in zip(rows or (), reqs, strict=False):
            if self._owners.get(row) is not req:
                self._owners[row] = req
                asked = self._config, req.sampling_params.custom_params
                self.memory.admit(row, request_budget_tokens(*asked), request_mass(*asked))
        return rows

    def free(self, req: Req) -> None:
        self._owners.pop(release.row_of(req), None)
        super().free(req)
