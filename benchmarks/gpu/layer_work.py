"""What surrounds attention in a decode layer: its matrix products, and a kernel for each of SGLang's small ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import ModelShape
from benchmarks.gpu.stand_in_attention import StandInAttention
from sglang_freekv.attention.base import DecodeAttention
from sglang_freekv.memory.geometry import Geometry, num_pages_of

# Geometry, most requests, most pages of a row and device -> attention.
NewAttention = Callable[[Geometry, int, int, str], DecodeAttention]


class LayerWork:
    """One layer of a Llama model, without attention, for a batch of one token per request; weights have no meaning.

    Run again and again it reads the same weights, which are larger than any cache, so each time from memory.
    """

    def __init__(self, shape: ModelShape, batch_size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        attended = shape.heads * shape.head_dim
        projected = attended + 2 * shape.kv_heads * shape.head_dim

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn((rows, columns), device=device).mul_(rows**-0.5).to(dtype)

        def buffer(columns: int) -> torch.Tensor:
            return torch.ones((batch_size, columns), dtype=dtype, device=device)

        self.batch_size = batch_size
        self._qkv, self._o = weight(shape.hidden, projected), weight(attended, shape.hidden)
        self._gate_up, self._down = (
            weight(shape.hidden, 2 * shape.intermediate),
            weight(shape.intermediate, shape.hidden),
        )
        self._head = weight(shape.hidden, shape.vocab)
        self._hidden, self._normed, self._gain = (buffer(shape.hidden) for _ in range(3))
        self._projected = buffer(projected)
        self._gates, self._activated = buffer(2 * shape.intermediate), buffer(shape.intermediate)
        self._logits = buffer(shape.vocab)

    @property
    def weight_bytes(self) -> int:
        """That a layer reads."""
        return sum(x.nbytes for x in (self._qkv, self._o, self._gate_up, self._down))

    def before_attention(self) -> None:
        """Norm, projections, rotary embedding."""
        torch.mul(self._hidden, self._gain, out=self._normed)
        torch.mm(self._normed, self._qkv, out=self._projected)
        self._projected.mul_(1.0)

    def after_attention(self, attended: torch.Tensor) -> None:
        """Output projection, norm, gated MLP.

        Parameters
        ----------
        attended : model dtype, ``[batch_size, heads * head_dim]``
        """
        torch.mm(attended, self._o, out=self._hidden)
        torch.mul(self._hidden, self._gain, out=self._normed)
        torch.mm(self._normed, self._gate_up, out=self._gates)
        gates, ups = self._gates.chunk(2, 1)
        torch.mul(gates, ups, out=self._activated)
        torch.mm(self._activated, self._down, out=self._hidden)

    def compute_logits(self) -> None:
        """What follows the last layer."""
        torch.mm(self._normed, self._head, out=self._logits)


def plain_layer(work: LayerWork, attend: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A layer around an attention whose tokens are all on the device."""

    def layer() -> None:
        work.before_attention()
        work.after_attention(attend().view(work.batch_size, -1))

    return layer


def attend_blocks(
    session: Session, batch_size: int, context: int, new_attention: NewAttention = StandInAttention
) -> Callable[[], torch.Tensor]:
    """Write a token of each request, and attend to `context` tokens of each, in blocks as a window's."""
    g, device = session.shape.geometry(1), session.device
    num_pages, num_rows = num_pages_of(context, g.page_size), batch_size * g.num_kv_heads
    attention = new_attention(g, batch_size, num_pages, device)
    block_kv = torch.empty((num_rows * num_pages, 2, g.page_size, g.head_dim), dtype=g.dtype, device=device).normal_()
    attention.last_page_len.fill_(g.page_size)
    attention.kv_indices[: len(block_kv)] = torch.randperm(len(block_kv), device=device).int()
    attention.plan([num_pages] * num_rows)
    q = torch.randn((batch_size, g.num_kv_heads, g.group_size, g.head_dim), device=device).to(g.dtype)
    kv = torch.zeros((num_rows, 2, g.head_dim), dtype=g.dtype, device=device)
    written = block_kv[:num_rows, :, 0]

    def attend() -> torch.Tensor:
        written.copy_(kv)
        return attention.run(q, block_kv, g.head_dim**-0.5)

    return attend
