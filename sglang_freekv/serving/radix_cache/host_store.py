"""What a cache of prefixes does for the host store, whichever of SGLang's it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed import get_rank

from sglang_freekv.releases import release
from sglang_freekv.serving.request_log import RequestLog

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


class OfHostStore:
    """Comes before a cache of SGLang's, whose values are slots of the host store.

    So a shared prefix is stored once there, and its page summaries, indexed by page, are shared with it. Eviction frees
    host pages. Blocks of an evicted page stay on the device until the page gets a new owner or the clock takes them;
    nobody can reach them before that.
    """

    evicted_tokens = 0  # since start-up

    def __init__(self, params: CacheInitParams) -> None:
        super().__init__(params)
        group = params.tp_cache_group
        self._logs = group is None or get_rank(group) == 0  # one rank for all
        self._request_log = RequestLog(params.token_to_kv_pool_allocator.get_kvcache().memory)

    def note_end(self, req: Req, num_tokens: int) -> None:
        """A request leaves its row, at its end or because it is retracted."""
        if self._logs and req.finished():
            self._request_log.end(req, self.req_to_token_pool.req_to_token[release.row_of(req), :num_tokens])

    def report(self) -> dict[str, int]:
        """Tokens of the host store that the cache holds, for `/server_info`."""
        protected = self.protected_size()
        return {
            "tree_tokens": self.evictable_size() + protected,
            "tree_protected_tokens": protected,
            "tree_evicted_tokens": self.evicted_tokens,
        }

    def release_host_resources(self) -> None:
        """Unpin the host store: the kernel would take long over it when the process dies.

        A scheduler that ends as asked calls this on its cache, so that a patch is not needed.
        """
        self.token_to_kv_pool_allocator.get_kvcache().memory.unpin()
