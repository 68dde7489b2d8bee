"""Machines: what they hold, and how fast they are. Here those that are planned for; `fit` describes the one at hand."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cost_model.cards import FLOPS_SHARE, H100, LINK_SHARE, MEMORY_SHARE, RTX_4090, Card
from benchmarks.cost_model.launches import GATE, LAYER_S, STEP_S, fixed_seconds, pages_per_second, rows_seconds
from sglang_freekv.doctor.capacity import free_before_weights
from sglang_freekv.memory.units import GIB

# Where nothing could be measured: what reads of blocks of 16 KiB get of the memory rate; and a scan of a layer's usual
# pages, of 2 bits and 128 elements: bytes of one of them, and columns of a row.
_WINDOW_SHARE, _PAGE_BYTES, _COLUMNS = 0.85, 1280, 1024
_ALL_REDUCE_S = 15e-6  # of a few requests' hidden states over NVLink, twice per layer


@dataclass(frozen=True)
class Kernels:
    """What one engine's step costs beyond weights and recalls, on one machine."""

    step_s: float  # of every step
    layer_s: float  # of every layer
    request_s: float  # of every request in every layer
    attention_gbs: float  # at which attention reads KV
    select_s: float = 0.0  # to select the windows of one layer, whatever their number
    scoring_gbs: float = float("inf")  # at which summaries and codes are read


@dataclass(frozen=True)
class Machine:
    """One server: equal GPUs, or a CPU that is its own device. Rates are what is reached, not peaks."""

    name: str
    device_gib: float  # of one GPU
    memory_gbs: float  # of one GPU's memory
    flops: float  # of one GPU, bfloat16, dense
    link_gbs: float  # from host memory to one GPU
    host_gib: float  # all of it
    host_gbs: float  # of the host memory, which the GPUs share
    plain: Kernels
    freekv: Kernels
    source: str  # of the rates
    gpus: int = 1
    overlaps: bool = True  # recalls run beside the computation: a second stream, which a CPU has not
    all_reduce_s: float = 0.0
    num_sms: int = 132  # of one GPU; sizes FlashInfer's workspaces
    static_share: float = 0.88  # of the device, for weights and KV: what SGLang makes of --mem-fraction-static
    host_share: float = 0.8  # of the host, for the host store: the rest is for the system

    @property
    def device(self) -> str:
        return "cuda" if self.overlaps else "cpu"

    @property
    def recall_gbs(self) -> float:
        """Of one GPU while all of them recall."""
        return min(self.link_gbs, self.host_gbs / self.gpus)

    def device_bytes(self, weight_bytes: int) -> int:
        """For KV on one GPU, beside its weights."""
        return int(free_before_weights(int(self.device_gib * GIB)) * self.static_share) - weight_bytes

    def host_bytes(self, ranks: int = 1) -> int:
        """For the host stores of `ranks` GPUs."""
        return int(self.host_gib * GIB * self.host_share) * ranks // self.gpus


def published(
    name: str, card: Card, *, host_gib: float, host_gbs: float, static_share: float, gpus: int = 1
) -> Machine:
    """A machine that nobody has measured: published peaks, and the shares assumed above."""
    rate, layer_s = card.memory_rate / 1e9, LAYER_S + fixed_seconds(GATE)
    scoring, select_s = min(rate, pages_per_second(card) * _PAGE_BYTES / 1e9), rows_seconds(card, 1, _COLUMNS)
    return Machine(
        name=name,
        device_gib=card.device_gib,
        memory_gbs=rate,
        flops=card.tflops * 1e12 * FLOPS_SHARE,
        link_gbs=card.link_rate / 1e9,
        host_gib=host_gib,
        host_gbs=host_gbs * LINK_SHARE,
        plain=Kernels(STEP_S, LAYER_S, 0.0, rate),
        freekv=Kernels(STEP_S, layer_s, 0.0, rate * _WINDOW_SHARE, select_s, scoring),
        source=(
            f"Rates are assumed: {MEMORY_SHARE:.0%} of the published memory bandwidth ({_WINDOW_SHARE:.0%} of that "
            f"for windows), {LINK_SHARE:.0%} of the link, {FLOPS_SHARE:.0%} of the matrix rate; so are "
            f"{STEP_S * 1e3:.2f} ms per step, {LAYER_S * 1e6:.0f} us per layer, {layer_s * 1e6:.0f} us with "
            f"retrieval. By counted instructions codes are read at {scoring:,.0f} GB/s, and a layer's pages are "
            f"selected in {select_s * 1e6:.0f} us."
        ),
        gpus=gpus,
        num_sms=card.num_sms,
        static_share=static_share,
        all_reduce_s=_ALL_REDUCE_S,
    )


DESKTOP = published(
    "24 GB card",
    RTX_4090,
    # A desktop board with two channels of DDR5-5600: 2 * 44.8 GB/s.
    host_gib=256,
    host_gbs=89.6,
    static_share=0.847,  # what SGLang chooses for 24 GiB and chunks of 2,048 tokens
)
H100_X8 = published(
    "8 x H100 80 GB",
    H100,
    # NVIDIA, DGX H100 user guide: 2 TB of system memory, two Xeon 8480C, each with 8 channels of DDR5-4800 (38.4 GB/s).
    host_gib=2048,
    host_gbs=614,
    static_share=0.83,  # SGLang chooses 0.836 for one rank on 80 GiB, 0.819 for eight
    gpus=8,
)
MACHINES = {"rtx4090": DESKTOP, "h100x8": H100_X8}
