"""The codecs that there are; what a kernel does for each: `records_triton`."""

from __future__ import annotations

from freekv_kernels.records import PLAIN, Codec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (PLAIN,)}
