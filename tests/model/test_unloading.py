"""Giving back a model's memory."""

from __future__ import annotations

import weakref

import pytest
import torch

from heretic.model.unloading import unload, unloaded_after
from tests.tiny import tiny_model


def test_unloaded_model_keeps_no_numbers_even_while_somebody_refers_to_it() -> None:
    model = tiny_model("llama")
    storages = [weakref.ref(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())]
    unload(model)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert len(storages) > 10 and not any(storage() for storage in storages)


def test_model_is_unloaded_after_an_error_too() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), unloaded_after(module):
        assert module.weight.device.type == "cpu"
        raise ZeroDivisionError
    assert module.weight.device.type == "meta"
