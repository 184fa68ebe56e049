"""Cards as queues: a launch log replayed with the rates of data sheets. Simulated times, not measured ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launch_log import RAM, AllReduce, Copy, Event, Gather, Launch, Wait


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
    hop: float = 10e-6  # seconds before the first byte of a copy, or of a step of a collective operation, arrives
    asynchronous: bool = True  # the host does not wait for a kernel; false on a CPU


DEFAULTS = Assumptions()


@dataclass
class Group:
    """A micro-batch: what it waits for."""

    arrivals: dict[int, float] = field(default_factory=dict)  # by card: when its last copy is there
    done: float = 0.0  # when its last event is


class Timeline:
    """The host launches, every card works through its queue.

    Args:
        cards: the cards of a pipeline, or one that stands for all `ranks` of tensor parallelism.
        assumptions: what no data sheet says.
        ranks: processes of tensor parallelism.
        side_streams: copies between cards have streams of their own, and only their own group waits for them. False is what
            PyTorch does by itself: a copy waits for the queues of both cards, and both wait for it.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        assumptions: Assumptions = DEFAULTS,
        *,
        ranks: int = 1,
        side_streams: bool = False,
    ) -> None:
        self.cards, self.assumptions, self.ranks, self.side_streams = cards, assumptions, ranks, side_streams
        self.host = 0.0
        self.free = [0.0] * len(cards)
        self.busy = [0.0] * len(cards)
        self.links: dict[tuple[int, int], float] = {}

    @property
    def end(self) -> float:
        """When the host and all cards are done."""
        return max(self.host, *self.free)

    def replay(self, events: Iterable[Event], group: Group | None = None) -> None:
        """Replay events in order. With a group the host waits only for what it reads, and only until that group is done."""
        alone, group = group is None, group or Group()
        for event in events:
            if isinstance(event, Wait):
                if alone:
                    self.host = max(self.host, self.free[event.card])
                elif event.read:
                    self.host = max(self.host, group.done)
                continue
            self.host += self.assumptions.launch
            if isinstance(event, Copy) and RAM not in event[:2]:
                group.done = self._copy(event, group)
                continue
            card = max(event.source, event.target) if isinstance(event, Copy) else getattr(event, "card", 0)
            start = max(self.host, self.free[card], group.arrivals.pop(card, 0.0))
            group.done = self.free[card] = start + self.seconds(event, self.cards[card])
            if isinstance(event, Launch):
                self.busy[card] += group.done - start
            if not self.assumptions.asynchronous:
                self.host = group.done

    def replay_in_turn(self, groups: Sequence[Sequence[Event]]) -> None:
        """Replay the events of several groups: each until its pass has left the last card, then the next."""
        chunks = [passes_of(events, len(self.cards) - 1) for events in groups]
        states = [Group() for _ in groups]
        for number in range(max(map(len, chunks))):
            for own, state in zip(chunks, states, strict=True):
                if number < len(own):
                    self.replay(own[number], state)

    def seconds(self, event: Event, card: Card) -> float:
        """Seconds that an event takes on a card: a kernel the longer of its FLOPs and its bytes, a collective one a ring."""
        a = self.assumptions
        if isinstance(event, Launch):
            return max(event.flops / (a.compute * card.flops), event.bytes / (a.memory * card.bandwidth), a.kernel)
        if isinstance(
            event, (AllReduce, Gather)
        ):  # NCCL's ring: every rank sends (n - 1) / n of the bytes, once or twice
            rounds = (self.ranks - 1) * (2 if isinstance(event, AllReduce) else 1)
            return rounds * (event.bytes / self.ranks / (a.links * card.link) + a.hop)
        assert isinstance(event, Copy)
        rate = card.host_link if RAM in event[:2] else card.link
        return a.hop + event.bytes / (a.links * rate)

    def _copy(self, copy: Copy, group: Group) -> float:
        source, target = copy.source, copy.target
        taken = self.seconds(copy, self.cards[source])
        if not self.side_streams:  # at::native::copy_device_to_device: a barrier of both streams before and after
            start = max(self.host, self.free[source], self.free[target])
            self.free[source] = self.free[target] = start + taken
            return start + taken
        start = max(self.host, self.free[source], self.links.get((source, target), 0.0))
        self.links[source, target] = start + taken
        group.arrivals[target] = max(group.arrivals.get(target, 0.0), start + taken)
        return start + taken


def passes_of(events: Sequence[Event], last: int) -> list[list[Event]]:
    """Split events where another group can take its turn: once a pass has been through the last card.

    That is where work returns to an earlier card, and before the host reads.
    """
    passes: list[list[Event]] = [[]]
    on_last = False
    for event in events:
        if on_last and (event.read if isinstance(event, Wait) else _returns(event, last)):
            passes.append([])
            on_last = False
        passes[-1].append(event)
        on_last = on_last or (isinstance(event, Launch) and event.card == last)
    return passes


def _returns(event: Event, last: int) -> bool:
    """Whether an event runs on an earlier card than the last, and does not move its results there."""
    if isinstance(event, Copy):
        return event.source != last and event.target != last
    return isinstance(event, Launch) and event.card != last
