"""Copies between RAM and pretend GPUs: their values, and how often the host waits for them."""

from __future__ import annotations

import pytest
import torch

from heretic.model.transfer import (
    HostCopies,
    RowsToStore,
    rows_to_device,
    send_through_ram,
    to_device,
    to_devices,
    to_host,
)
from tests.helpers.pretend_gpus import PretendGpus

pytestmark = pytest.mark.usefixtures("cuda")


def waits(gpus: PretendGpus) -> int:
    return sum(gpus.syncs["-"].values())


def test_copies_to_gpus_are_pinned_and_wait_for_nothing() -> None:
    stored = torch.arange(12.0).view(4, 3)
    with PretendGpus(2) as gpus:
        numbers = to_device([[1, 2], [3, 4]], "cuda:1")
        rows = rows_to_device(stored, torch.tensor([2, 0]), "cuda:0")
        assert waits(gpus) == 0 and {kind for _, kind, _ in gpus.async_copies} == {"pinned"}
        assert numbers.tolist() == [[1, 2], [3, 4]] and rows.tolist() == [[6, 7, 8], [0, 1, 2]]
    assert rows_to_device(stored, torch.tensor([1]), "cpu").tolist() == [[3, 4, 5]]


def test_tensors_of_several_gpus_travel_together_and_so_do_their_gradients() -> None:
    given = [torch.full((i + 1, 2), float(i), requires_grad=True) for i in range(4)]
    devices = [torch.device(d) for d in ("cuda:1", "cpu", "cuda:0", "cuda:1")]
    with PretendGpus(2) as gpus:
        moved = to_devices(given, devices)
        assert [t.device for t in moved] == devices and waits(gpus) == 0
        on_gpus = (0, 2, 3)
        total = sum((moved[i] * (i + 1)).sum().to("cuda:0") for i in on_gpus)
        found = torch.autograd.grad(total, [given[i] for i in on_gpus])
        assert waits(gpus) == 1
        in_ram = to_host(moved)
        assert waits(gpus) == 2
    assert [g.unique().tolist() for g in found] == [[1.0], [3.0], [4.0]]
    assert all(torch.equal(after, before) for after, before in zip(in_ram, given, strict=True))


def test_copies_to_ram_are_awaited_once_for_each_gpu() -> None:
    with PretendGpus(2) as gpus:
        copies = HostCopies()
        kept = [copies.copy(torch.full((2, 3), float(i), device=f"cuda:{i % 2}").mT) for i in range(6)]
        assert waits(gpus) == 0 and copies.bytes == 6 * 24
        copies.wait()
        assert waits(gpus) == 2 and copies.bytes == 0
        assert [t.unique().tolist() for t in kept] == [[float(i)] for i in range(6)]


def test_tensor_that_returns_through_ram_makes_nobody_wait_but_its_reader() -> None:
    with PretendGpus(2) as gpus:
        sent = torch.full((2, 3), 7.0, device="cuda:1")
        arrive = send_through_ram(sent, torch.device("cuda:0"))
        found = arrive()
        assert waits(gpus) == 0 and not gpus.peer_bytes
        assert found.device.index == 0 and found.tolist() == [[7.0] * 3] * 2
        assert send_through_ram(sent, sent.device)() is sent
    on_cpu = torch.ones(2)
    assert send_through_ram(on_cpu, torch.device("cpu"))() is on_cpu


def test_rows_reach_their_places_without_those_that_are_left_out() -> None:
    with PretendGpus(1) as gpus:
        stored, store = torch.zeros(4, 2), RowsToStore()
        store.add(stored, torch.tensor([3, -1, 0]), torch.arange(6.0, device="cuda:0").view(3, 2))
        assert waits(gpus) == 0
        store.write()
        assert waits(gpus) == 1 and stored.tolist() == [[4, 5], [0, 0], [0, 0], [0, 1]]
