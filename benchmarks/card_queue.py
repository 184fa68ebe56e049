"""Cards as queues: a launch log replayed with the rates of data sheets. Simulated times, not measured ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch_log import RAM, Copy, Delay, Event, Launch, Mark, Wait


@dataclass(frozen=True)
class Card:
    """Rates of a GPU."""

    name: str
    flops: float  # dense bfloat16 FLOP/s with float32 sums
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another card, one direction
    host_link: float  # bytes/s to RAM, one direction
    source: str


PCIE_4 = 16 * 16e9 / 8 * 128 / 130  # 16 lanes of 16 GT/s, 128b/130b: 31.5 GB/s (PCI Express Base Specification 4.0)
RTX_4090 = Card(
    "RTX 4090", 165.2e12, 1.008e12, PCIE_4 / 2, PCIE_4,
    "NVIDIA Ada GPU Architecture, appendix A: 165.2 TFLOPS, 1008 GB/s, PCIe 4.0 x16; no NVLink, so copies pass through RAM",
)  # fmt: skip
A100 = Card(
    "A100 80GB", 312e12, 2.039e12, 300e9, PCIE_4,
    "NVIDIA A100 80GB data sheet (SXM): 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s in both directions, PCIe 4.0 x16",
)  # fmt: skip
H100 = Card(
    "H100 SXM", 989.4e12, 3.35e12, 450e9, 2 * PCIE_4,
    "NVIDIA H100 data sheet (SXM): 989.4 TFLOPS without sparsity, 3.35 TB/s, NVLink 900 GB/s in both directions, PCIe 5.0 x16",
)  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    launch: float = 8e-6  # seconds of the host for each kernel and copy: Python, PyTorch's dispatcher, the driver
    compute: float = 0.6  # reached share of the FLOP/s
    memory: float = 0.75  # reached share of the memory's bandwidth
    links: float = 0.8  # reached share of a link's bandwidth
    kernel: float = 2e-6  # seconds of the shortest kernel
    hop: float = 10e-6  # seconds before the first byte of a copy arrives
    asynchronous: bool = True  # the host does not wait for a kernel; false on a CPU


DEFAULTS = Assumptions()


class Timeline:
    """The host launches, every card works through its queue.

    A copy between two cards is PyTorch's own: it waits for the queues of both, and both wait for it (copy_device_to_device in
    ATen/native/cuda/Copy.cu).

    Args:
        cards: the cards of a pipeline.
        assumptions: what no data sheet says.
    """

    def __init__(self, cards: Sequence[Card], assumptions: Assumptions = DEFAULTS) -> None:
        self.cards, self.assumptions = cards, assumptions
        self.host = 0.0
        self.free = [0.0] * len(cards)
        self.busy = [0.0] * len(cards)
        self.marks: dict[int, float] = {}

    @property
    def end(self) -> float:
        """When the host and all cards are done."""
        return max(self.host, *self.free)

    def replay(self, events: Iterable[Event]) -> None:
        """Replay events in their order."""
        for event in events:
            if isinstance(event, Mark):
                self.marks[event.number] = self.free[event.card]
            elif isinstance(event, Delay):
                self.free[event.card] = max(self.free[event.card], self.marks[event.mark])
            elif isinstance(event, Wait):
                self.host = max(self.host, self.free[event.card] if event.mark is None else self.marks[event.mark])
            else:
                self._launch(event)

    def _launch(self, event: Launch | Copy) -> None:
        self.host += self.assumptions.launch
        cards = [card for card in event[:2] if card != RAM] if isinstance(event, Copy) else [event.card]
        start = max(self.host, *(self.free[card] for card in cards))
        done = start + self.seconds(event, self.cards[cards[0]])
        for card in cards:
            self.free[card] = done
        if isinstance(event, Launch):
            self.busy[event.card] += done - start
        if not self.assumptions.asynchronous:
            self.host = done

    def seconds(self, event: Event, card: Card) -> float:
        """Seconds that an event takes on a card: a kernel the longer of its FLOPs and its bytes."""
        a = self.assumptions
        if isinstance(event, Launch):
            return max(event.flops / (a.compute * card.flops), event.bytes / (a.memory * card.bandwidth), a.kernel)
        assert isinstance(event, Copy)
        rate = card.host_link if RAM in event[:2] else card.link
        return a.hop + event.bytes / (a.links * rate)
