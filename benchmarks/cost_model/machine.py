"""Machines: what they hold, and how fast they are. Here those that are planned for; `fit` describes the one at hand."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_freekv.doctor.capacity import free_before_weights
from sglang_freekv.memory.units import GIB

# Where nothing could be measured. Shares of the published peak that a good kernel or copy gets ...
_MEMORY_SHARE, _LINK_SHARE, _FLOPS_SHARE = 0.9, 0.85, 0.7
# ... and what the reads that are not one long run get of that memory rate: blocks of 16 KiB, and codes to unpack.
_WINDOW_SHARE, _SCORING_SHARE = 0.85, 0.5
# Sampling and what lies between two graphs; a dozen small kernels per layer; and as many more for retrieval, which run
# even if they find nothing to do: 2 to 3 microseconds each.
_STEP_S, _LAYER_S, _FREEKV_LAYER_S = 250e-6, 15e-6, 45e-6
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
    name: str,
    *,
    device_gib: float,
    memory_gbs: float,
    tflops: float,
    link_gbs: float,
    host_gib: float,
    host_gbs: float,
    num_sms: int,
    static_share: float,
    gpus: int = 1,
) -> Machine:
    """A machine that nobody has measured: published peaks, and the shares assumed above."""
    rate = memory_gbs * _MEMORY_SHARE
    return Machine(
        name=name,
        device_gib=device_gib,
        memory_gbs=rate,
        flops=tflops * 1e12 * _FLOPS_SHARE,
        link_gbs=link_gbs * _LINK_SHARE,
        host_gib=host_gib,
        host_gbs=host_gbs * _LINK_SHARE,
        plain=Kernels(_STEP_S, _LAYER_S, 0.0, rate),
        freekv=Kernels(_STEP_S, _FREEKV_LAYER_S, 0.0, rate * _WINDOW_SHARE, 0.0, rate * _SCORING_SHARE),
        source=(
            f"Rates are assumed: {_MEMORY_SHARE:.0%} of the published memory bandwidth ({_WINDOW_SHARE:.0%} of that "
            f"for windows, {_SCORING_SHARE:.0%} for codes), {_LINK_SHARE:.0%} of the link, {_FLOPS_SHARE:.0%} of the "
            f"matrix rate; so are {_STEP_S * 1e3:.2f} ms per step, {_LAYER_S * 1e6:.0f} us per layer, and "
            f"{_FREEKV_LAYER_S * 1e6:.0f} us with retrieval."
        ),
        gpus=gpus,
        num_sms=num_sms,
        static_share=static_share,
        all_reduce_s=_ALL_REDUCE_S,
    )


RTX_4090 = published(
    "24 GB card",
    # NVIDIA, Ada GPU architecture whitepaper, table of the RTX 4090: 24 GB GDDR6X at 1,008 GB/s, 165.2 TFLOPS of bf16
    # with fp32 accumulation, dense. PCIe 4.0 x16: 16 GT/s * 16 lanes * 128/130 = 31.5 GB/s.
    device_gib=24,
    memory_gbs=1008,
    tflops=165.2,
    link_gbs=31.5,
    # A desktop board with two channels of DDR5-5600: 2 * 44.8 GB/s.
    host_gib=256,
    host_gbs=89.6,
    num_sms=128,
    static_share=0.847,  # what SGLang 0.5.17 chooses for 24 GiB
)
H100_X8 = published(
    "8 x H100 80 GB",
    # NVIDIA, H100 datasheet, SXM5: 80 GB HBM3 at 3.35 TB/s, 989 TFLOPS of bf16, dense. PCIe 5.0 x16: 63 GB/s.
    device_gib=80,
    memory_gbs=3350,
    tflops=989,
    link_gbs=63,
    # NVIDIA, DGX H100 user guide: 2 TB of system memory, two Xeon 8480C, each with 8 channels of DDR5-4800 (38.4 GB/s).
    host_gib=2048,
    host_gbs=614,
    num_sms=132,
    static_share=0.83,  # SGLang 0.5.17 chooses 0.836 for one rank on 80 GiB, 0.819 for eight
    gpus=8,
)
MACHINES = {"rtx4090": RTX_4090, "h100x8": H100_X8}
