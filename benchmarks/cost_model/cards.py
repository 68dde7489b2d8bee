"""Cards: what their makers publish, and which share of it a good kernel or copy gets where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_SHARE, LINK_SHARE, FLOPS_SHARE = 0.9, 0.85, 0.7  # assumed, of the published peak


@dataclass(frozen=True)
class Card:
    """One GPU. Rates are published peaks unless the name says otherwise."""

    name: str
    device_gib: float
    memory_gbs: float
    tflops: float  # bfloat16, dense
    link_gbs: float  # one direction, from the host's memory
    num_sms: int
    clock_ghz: float  # at which `tflops` is reached
    capability: int  # compute capability, without its point

    @property
    def memory_rate(self) -> float:
        """Bytes per second that are assumed to be reached."""
        return self.memory_gbs * 1e9 * MEMORY_SHARE

    @property
    def link_rate(self) -> float:
        """Bytes per second that are assumed to be reached."""
        return self.link_gbs * 1e9 * LINK_SHARE


# PCIe 4.0 x16: 16 GT/s * 16 lanes * 128/130 = 31.5 GB/s; 5.0 has twice that.
RTX_4090 = Card(
    # NVIDIA, Ada GPU architecture whitepaper, table of the RTX 4090: GDDR6X, fp32 accumulation, boost clock.
    name="RTX 4090",
    device_gib=24,
    memory_gbs=1008,
    tflops=165.2,
    link_gbs=31.5,
    num_sms=128,
    clock_ghz=2.52,
    capability=89,
)
A100 = Card(
    # NVIDIA, A100 80 GB datasheet, SXM; clock: A100 whitepaper.
    name="A100",
    device_gib=80,
    memory_gbs=2039,
    tflops=312,
    link_gbs=31.5,
    num_sms=108,
    clock_ghz=1.41,
    capability=80,
)
H100 = Card(
    # NVIDIA, H100 datasheet, SXM5. Clock: 989 TFLOPS of 132 * 4 tensor cores with 1,024 operations per clock.
    name="H100",
    device_gib=80,
    memory_gbs=3350,
    tflops=989,
    link_gbs=63,
    num_sms=132,
    clock_ghz=1.83,
    capability=90,
)
H200 = Card(
    # NVIDIA, H200 datasheet, SXM: the chip of the H100 with other memory.
    name="H200",
    device_gib=141,
    memory_gbs=4800,
    tflops=989,
    link_gbs=63,
    num_sms=132,
    clock_ghz=1.83,
    capability=90,
)
CARDS = {card.name: card for card in (H200, H100, A100, RTX_4090)}


def card_named(device: str) -> Card | None:
    """The card that a device calls itself, as "NVIDIA H100 80GB HBM3"; None where nothing is known of it."""
    return next((card for name, card in CARDS.items() if name in device), None)
