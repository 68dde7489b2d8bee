"""SGLang 0.5.23 asks a platform what it can do, and builds its own pools and allocators accordingly."""

from __future__ import annotations

from sglang.srt.platforms.interface import PlatformCapabilities


class Pools:
    """The part of a platform on which SGLang builds its memory."""

    capabilities = PlatformCapabilities(supports_triton=False, graph_capture=False)
