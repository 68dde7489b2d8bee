"""Arguments of servers, as far as patches look at them."""

from __future__ import annotations

from types import SimpleNamespace

from sglang_freekv.config import FreeKVConfig

PLAIN = SimpleNamespace()
FREEKV = SimpleNamespace(_freekv=FreeKVConfig())
