"""The radix cache backend `freekv`: SGLang's tree over slots of the host store, with counters and an end."""

from __future__ import annotations

from sglang_freekv.tested_release import module_for_release

_release = module_for_release(__name__)
FreeKVRadixCache, create_radix_cache = _release.FreeKVRadixCache, _release.create_radix_cache
