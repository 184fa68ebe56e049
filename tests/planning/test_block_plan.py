"""Where a model runs that is read block by block."""

from __future__ import annotations

from typing import Any

import pytest

from heretic.hardware.devices import Device
from heretic.planning.block_plan import BlockPlan, plan_by_block
from heretic.planning.workload import Workload
from heretic.settings import Settings
from tests.helpers.errors import raises
from tests.helpers.shapes import checkpoint_of, cpu, gpus, qwen_32b

BLOCK_AND_ENDS = 2 * (
    2 * 152064 * 5120 + 5120 + 3 * 27648 * 5120 + 2 * 5120**2 + 2 * 5120 * 1024 + 5120 + 2 * 1024 + 2 * 5120
)


def planned(*devices: Device, **settings: Any) -> BlockPlan:
    work = Workload(prompt_tokens=100, new_tokens=1)
    return plan_by_block(Settings(model="owner/model", **settings), checkpoint_of(qwen_32b()), work, devices)


def test_a_gpu_is_used_if_a_block_fits_there() -> None:
    plan = planned(*gpus(2, 8), cpu(16))
    assert (plan.device.name, plan.dtype, plan.mixture) == ("cuda:0", "bfloat16", False)
    assert plan.weights == BLOCK_AND_ENDS and plan.batch_size >= 1
    assert planned(*gpus(1, 4), cpu(16)).device.name == "cpu"
    assert planned(*gpus(1, 8), cpu(16), device_map="cpu").device.name == "cpu"
    assert planned(*gpus(1, 24), cpu(16), batch_size=3).batch_size == 3


@pytest.mark.parametrize(
    ("ram", "settings", "code"),
    [
        (4, {}, "block-too-large"),
        (64, {"device_map": {"": "cpu"}}, "not-by-block"),
        (64, {"device_map": "cuda:7"}, "device-not-there"),
    ],
)
def test_what_has_no_place(ram: int, settings: dict[str, Any], code: str) -> None:
    with raises(code):
        planned(cpu(ram), **settings)
