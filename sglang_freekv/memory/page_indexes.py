"""The page indexes that there are."""

from __future__ import annotations

import torch

from freekv_kernels import Ops, PageStore
from freekv_kernels.encode_pages import code_steps, unpack_codes
from freekv_kernels.fp8 import LARGEST, encode_bounds
from sglang_freekv.config import FreeKVConfig
from sglang_freekv.memory.geometry import Geometry
from sglang_freekv.memory.page_index import PageIndex

# Of a code's arithmetic in fp32, relative to its largest operand.
_ROUNDING = 1e-6


class MinMaxIndex(PageIndex):
    """Minimum and maximum of each channel of a page's post-RoPE keys, in FP8: see `fp8`.

    A layer with a sliding window has no index, as nothing is chosen in it.

    Attributes
    ----------
    places : dict of int to int
        Layer number -> its place in the tensors, of the layers that have an index.
    summaries : uint8, ``[num_full_layers, num_host_pages, num_kv_heads, 2, head_dim]``, device
    """

    def __init__(self, geometry: Geometry, num_host_pages: int, device: str) -> None:
        g = geometry
        self.geometry = g
        self.places = g.places
        shape = (len(g.full_layers), num_host_pages, g.num_kv_heads, 2, g.head_dim)
        self.summaries = torch.empty(shape, dtype=torch.uint8, device=device)

    @staticmethod
    def page_bytes(geometry: Geometry) -> int:
        g = geometry
        return len(g.full_layers) * g.num_kv_heads * 2 * g.head_dim

    def summary(self, number: int) -> torch.Tensor | None:
        return self.summaries[self.places[number]] if number in self.places else None

    def seal(self, ops: Ops, number: int, store: PageStore, slots: torch.Tensor, groups: torch.Tensor) -> None:
        pass  # a summary is complete with every token

    def audit(
        self, number: int, store: PageStore, pages: torch.Tensor, filled: torch.Tensor, groups: torch.Tensor
    ) -> None:
        bounds = self._bounds(store, pages, filled, groups)
        is_wrong = (_of_pages(self.summary(number), pages) != bounds).flatten(1).any(1)
        if is_wrong.any():
            raise RuntimeError(f"layer {number}: wrong summary of host page {int(pages[is_wrong][0])}")

    def _bounds(
        self, store: PageStore, pages: torch.Tensor, filled: torch.Tensor, groups: torch.Tensor
    ) -> torch.Tensor:
        """What the summaries of pages must be: uint8, ``[n, num_kv_heads, 2, head_dim]``."""
        is_written = torch.arange(self.geometry.page_size) < filled[:, None]
        is_written = is_written[:, None, :, None]  # of [n, num_kv_heads, page_size, head_dim]
        keys = store.codec.decode_keys(store.host_kv, pages, self.geometry.dtype)
        low = keys.masked_fill(~is_written, float("inf")).amin(2)
        high = keys.masked_fill(~is_written, float("-inf")).amax(2)
        return encode_bounds(low, high)

    @property
    def nbytes(self) -> int:
        return self.summaries.nbytes


class CodesIndex(MinMaxIndex):
    """Every key of a full page in a few bits per element, each channel within the page's minimum and maximum.

    Attributes
    ----------
    codes : uint8, ``[num_full_layers, num_host_pages, num_kv_heads, page_size, head_dim * key_bits // 8]``, device
    """

    def __init__(self, geometry: Geometry, num_host_pages: int, device: str) -> None:
        super().__init__(geometry, num_host_pages, device)
        g = geometry
        if not g.key_bits:
            raise ValueError("An index of codes needs bits for them; key_bits is 0.")
        shape = (len(g.full_layers), num_host_pages, g.num_kv_heads, g.page_size, g.head_dim * g.key_bits // 8)
        self.codes = torch.empty(shape, dtype=torch.uint8, device=device)

    def codes_of(self, number: int) -> torch.Tensor | None:
        """Of a layer: uint8, ``[num_host_pages, num_kv_heads, page_size, head_dim * key_bits // 8]``, or None."""
        return self.codes[self.places[number]] if number in self.places else None

    @staticmethod
    def page_bytes(geometry: Geometry) -> int:
        g = geometry
        codes = len(g.full_layers) * g.num_kv_heads * g.page_size * g.head_dim * g.key_bits // 8
        return MinMaxIndex.page_bytes(g) + codes

    def encoded_by_append(self, number: int, groups: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.codes_of(number), None

    def seal(self, ops: Ops, number: int, store: PageStore, slots: torch.Tensor, groups: torch.Tensor) -> None:
        ops.encode_pages(slots, store, self.codes_of(number))

    def audit(
        self, number: int, store: PageStore, pages: torch.Tensor, filled: torch.Tensor, groups: torch.Tensor
    ) -> None:
        """Also where a full page's keys are not within half a step of what their codes stand for."""
        super().audit(number, store, pages, filled, groups)
        g = self.geometry
        full = pages[filled == g.page_size]
        low, step = code_steps(_of_pages(self.summary(number), full)[:, :, None], g.key_bits)
        values, units = unpack_codes(_of_pages(self.codes_of(number), full), g.key_bits)
        values = values.transpose(2, 3) * units + 0.5
        keys = store.codec.decode_keys(store.host_kv, full, g.dtype).float().clamp_(-LARGEST, LARGEST)
        error = (low + values * step - keys).abs()
        is_wrong = (error > step / 2 + _ROUNDING * (low.abs() + step * 2**g.key_bits)).flatten(1).any(1)
        if is_wrong.any():
            raise RuntimeError(f"layer {number}: wrong codes of host page {int(full[is_wrong][0])}")

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.codes.nbytes


class GroupedCodesIndex(CodesIndex):
    """The same, and the page that ends a group of `GROUP_PAGES` has the bounds of the group: what is scored first."""

    def encoded_by_append(self, number: int, groups: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        codes = self.codes_of(number)
        return codes, None if codes is None else groups

    def seal(self, ops: Ops, number: int, store: PageStore, slots: torch.Tensor, groups: torch.Tensor) -> None:
        ops.encode_pages(slots, store, self.codes_of(number), groups)

    def _bounds(
        self, store: PageStore, pages: torch.Tensor, filled: torch.Tensor, groups: torch.Tensor
    ) -> torch.Tensor:
        bounds = super()._bounds(store, pages, filled, groups)
        keys = store.codec.decode_keys(store.host_kv, groups.flatten(), self.geometry.dtype)
        keys = keys.unflatten(0, groups.shape)  # [num_groups, GROUP_PAGES, num_kv_heads, page_size, head_dim]
        last = (pages == groups[:, -1:]).int().argmax(1)
        bounds[last] = encode_bounds(keys.amin((1, 3)), keys.amax((1, 3)))
        return bounds


class BallsIndex(MinMaxIndex):
    """The ball around the mean of a full page's keys that has all of them; for the baseline ArkVale.

    Attributes
    ----------
    centres : model dtype, ``[num_full_layers, num_host_pages, num_kv_heads, head_dim]``, device
    radii : float32, ``[num_full_layers, num_host_pages, num_kv_heads]``, device
        Around the centre as it is stored.
    """

    def __init__(self, geometry: Geometry, num_host_pages: int, device: str) -> None:
        super().__init__(geometry, num_host_pages, device)
        shape = (len(geometry.full_layers), num_host_pages, geometry.num_kv_heads)
        self.centres = torch.empty((*shape, geometry.head_dim), dtype=geometry.dtype, device=device)
        self.radii = torch.empty(shape, dtype=torch.float32, device=device)

    @staticmethod
    def page_bytes(geometry: Geometry) -> int:
        g = geometry
        balls = len(g.full_layers) * g.num_kv_heads * (g.head_dim * g.dtype.itemsize + 4)
        return MinMaxIndex.page_bytes(g) + balls

    def seal(self, ops: Ops, number: int, store: PageStore, slots: torch.Tensor, groups: torch.Tensor) -> None:
        page_size = self.geometry.page_size
        pages = slots[slots % page_size == page_size - 1] // page_size
        if len(pages) == 0:
            return
        keys = store.codec.decode_keys(store.host_kv, pages, self.geometry.dtype).float()
        centres = keys.mean(2).to(self.geometry.dtype)
        self.centres[self.places[number], pages] = centres
        self.radii[self.places[number], pages] = (keys - centres.float()[:, :, None]).norm(dim=-1).amax(-1)

    def audit(
        self, number: int, store: PageStore, pages: torch.Tensor, filled: torch.Tensor, groups: torch.Tensor
    ) -> None:
        """Also where a full page's ball is not around the mean of its keys, or does not just hold them."""
        super().audit(number, store, pages, filled, groups)
        full = pages[filled == self.geometry.page_size]
        keys = store.codec.decode_keys(store.host_kv, full, self.geometry.dtype).float()
        centres, radii = (_of_pages(x[self.places[number]], full).float() for x in (self.centres, self.radii))
        means, farthest = keys.mean(2), (keys - centres[:, :, None]).norm(dim=-1).amax(-1)
        rounding = torch.finfo(self.geometry.dtype).eps
        is_wrong = ((centres - means).abs() > rounding * keys.abs().amax(2)).any(-1)
        is_wrong |= (radii - farthest).abs() > _ROUNDING * (farthest + centres.norm(dim=-1))
        if (is_wrong := is_wrong.any(1)).any():
            raise RuntimeError(f"layer {number}: wrong ball of host page {int(full[is_wrong][0])}")

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.centres.nbytes + self.radii.nbytes


def _of_pages(tensor: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    return tensor[pages.to(tensor.device)].cpu()


# Name of a selector (`--freekv-selector`) -> the index that it reads.
INDEXES: dict[str, type[PageIndex]] = {
    "mass": CodesIndex,
    "codes": CodesIndex,
    "min-max": MinMaxIndex,
    "paper": MinMaxIndex,
    "streaming-llm": MinMaxIndex,  # reads none of it, as the next three
    "one-time": MinMaxIndex,
    "r-kv": MinMaxIndex,
    "corm": MinMaxIndex,
    "arkvale": BallsIndex,
}


def index_of(config: FreeKVConfig) -> type[PageIndex]:
    """The index that the selector of these settings reads; with two levels also bounds of groups."""
    return GroupedCodesIndex if config.candidates else INDEXES[config.selector_name]
