"""Settings blocks under a heading such as "32B on 4 x 24 GiB" fit on the machine that the heading names."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from heretic.planning.memory_plan import plan_for
from heretic.planning.workload import USUAL_PROMPT, Workload
from heretic.settings.sources import resolve
from tests.docs.pages import PAGES, ROOT
from tests.helpers.shapes import gpus

HEADED = re.compile(r"^#+ (\d+B) on (\d) x (\d+) GiB\n(?:(?!#|```)[^\n]*\n)*```toml\n(.*?)^```", re.M | re.S)
FOUND = [match for page in PAGES for match in HEADED.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("size, number, gib, block", FOUND, ids=lambda value: value if len(value) < 4 else "")
def test_a_working_configuration_fits(
    size: str, number: str, gib: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sizes = runpy.run_path(str(ROOT / "benchmarks/sizes.py"))
    file = tmp_path / "block.toml"
    file.write_text(block)
    settings = resolve(file, environment={}).settings
    checkpoint, devices = sizes["checkpoint_of"](sizes["SHAPES"][size]), gpus(int(number), int(gib) - 0.5)
    work = Workload.of(settings, USUAL_PROMPT)
    plan = plan_for(settings, checkpoint, work, devices)
    assert plan.fits and plan.batch_size >= 8
    without = plan_for(settings.model_copy(update={"quantization": "none"}), checkpoint, work, devices)
    assert without.fits == (settings.quantization == "none"), "quantized where it need not be"
