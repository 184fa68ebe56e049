"""The report in a real browser, from a file: what is drawn, what a click and a slider do, and that nothing leaves the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from heretic.pipeline.run import Outcome
from heretic.report.page import Page
from heretic.report.report import geometry_page, load_report_input
from heretic.report.reporter import write_report
from heretic.search.pareto import pareto_front
from tests.helpers.browser import Browser, browser, missing
from tests.report.runs import SCRIPT

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DRAWN = "return document.documentElement.dataset.drawn === 'yes'"
# The last are of the browser itself; what is asked for by any other scheme would leave the page.
OF_THE_PAGE = ("data:", "blob:", "file:", "chrome:")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(window: Browser, made: Outcome, tmp_path: Path) -> Iterator[Browser]:
    """The report with all texts, open; afterwards it must have asked for nothing and complained of nothing."""
    file = tmp_path / "report.html"
    write_report(load_report_input(str(made.folder.path), "", os.environ, with_texts=True), file)
    window.requested(), window.said()  # what the browser's own first page did
    window.size(1200, 900)
    window.open(file)
    window.wait(DRAWN)
    yield window
    assert window.said() == []
    asked = window.requested()
    assert [url for url in asked if not url.startswith(OF_THE_PAGE)] == []
    assert {url for url in asked if url.startswith("file:")} == {file.resolve().as_uri()}
    assert len(window.command("GET", "/window/handles")) == 1


def traces(window: Browser, figure: str) -> dict[str, int]:
    """Points by the name of the trace, as plotly holds them."""
    return window.js(
        "return Object.fromEntries(document.getElementById(arguments[0]).data.map(t => [t.name, t.x.length]))", figure
    )


def test_every_figure_is_drawn_with_what_the_study_holds(page: Browser, made: Outcome) -> None:
    names = page.js("return [...document.querySelectorAll('.figure')].map(f => f.id)")
    assert {f"figure-{n}" for n in ("front", "progress", "strengths", "divergences", "requests", "importance")} <= set(
        names
    )
    assert {f"figure-{n}" for n in ("separation", "projection", "norms", "cosines")} <= set(names)
    for name in names:
        assert page.js("return !!document.querySelector(`#${arguments[0]} svg.main-svg`)", name), f"{name} is not drawn"
    best = pareto_front(made.results)
    points = traces(page, "figure-front")
    assert points["Pareto front"] == len(best) and points["chosen"] == 1
    assert points.get("measured", 0) + len(best) == len(made.results)
    assert points.get("pruned (dominated): refusals estimated", 0) == 24 - len(made.results)
    marks = page.js("return document.querySelectorAll('#figure-front .scatterlayer .point').length")
    assert marks == sum(points.values())
    assert page.js("return document.querySelectorAll('#figure-cosines image').length") == 1


def test_the_slider_moves_the_projection_from_layer_to_layer(page: Browser) -> None:
    here = "return document.getElementById('figure-projection').data[0].x.join()"
    slider = '[data-choice="layer"]'
    seen = set()
    page.keys(slider, "\ue011")  # Home
    for layer in range(4):
        label = page.js("return document.querySelector('[data-label=\"layer\"]').textContent")
        assert label.startswith(f"layer {layer} of 0 to 3")
        seen.add(page.js(here))
        page.keys(slider, "\ue014")  # to the right
    assert len(seen) == 4
    assert traces(page, "figure-projection") == {"harmless": 18, "harmful": 16}


def test_a_click_on_the_front_and_the_list_choose_a_trial(page: Browser, made: Outcome) -> None:
    best = pareto_front(made.results)
    assert len(best) > 1, "this test needs a front"
    shown = "return document.querySelector('[data-block=\"trial\"]:not([hidden])').dataset.index"
    heights = "return document.getElementById('figure-strengths').data[0].y.join()"
    chosen = next(i for i, r in enumerate(best) if made.selected and r.number == made.selected.number)
    assert page.js(shown) == str(chosen)
    before, other = page.js(heights), (chosen + 1) % len(best)
    page.js("document.getElementById('figure-front').scrollIntoView({block: 'center', behavior: 'instant'})")
    x, y = page.js(
        """
        const figure = document.getElementById("figure-front"), {xaxis, yaxis} = figure._fullLayout;
        const trace = figure.data.find(t => t.name === "Pareto front"), box = figure.getBoundingClientRect();
        const i = trace.customdata.indexOf(arguments[0]);
        return [box.left + xaxis._offset + xaxis.d2p(trace.x[i]), box.top + yaxis._offset + yaxis.d2p(trace.y[i])];
        """,
        best[other].number,
    )
    page.click_at(x, y)
    page.wait(f"{shown} === '{other}'")
    assert page.js(heights) != before
    hover = page.wait("return document.querySelector('#figure-front .hoverlayer')?.textContent")
    assert f"trial {best[other].number}" in hover
    page.keys(
        '[data-choice="trial"]', page.js("return document.querySelector('[data-choice=\"trial\"]').options[0].text")
    )
    page.wait(f"{shown} === '0'")


def test_scripts_in_names_prompts_and_settings_stay_text(page: Browser) -> None:
    assert page.js("return window.hit") is None
    assert page.js("return document.title").endswith("tiny <img src=x onerror=window.hit=1>")
    texts = page.js("return [...document.querySelectorAll('details pre')].map(p => p.textContent)")
    assert len(texts) == 3 and all(SCRIPT in text for text in texts)
    assert page.js("return document.querySelectorAll('img').length") == 0
    assert page.js("return document.scripts.length") == 3


def test_nothing_sends_the_data_away(page: Browser) -> None:
    """plotly's own tool bar has a button that does."""
    buttons = page.js("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert buttons and not [b for b in buttons if b and ("Share" in b or "Cloud" in b or "Chart Studio" in b)]
    assert page.js("return [...document.links].filter(a => !a.getAttribute('href').startsWith('#')).length") == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(page: Browser, dark: bool) -> None:
    page.size(390, 800)
    page.dark(dark)
    page.wait("return document.getElementById('figure-front').getBoundingClientRect().width < 390")
    page.wait("return document.querySelector('#figure-front svg.main-svg').getBoundingClientRect().width < 390")
    assert page.js("return document.documentElement.scrollWidth") <= 390
    ink = page.js("return getComputedStyle(document.querySelector('#figure-front .xtick text')).fill")
    brightness = sum(int(n) for n in ink[4:-1].split(",")) / 3
    assert (brightness > 128) == dark, ink
    page.dark(False)


def test_the_policy_stops_scripts_and_requests_that_got_in(window: Browser, tmp_path: Path) -> None:
    """Were a text ever not escaped, this is what would be left of it."""
    built = Page("attacked")
    built.parts.append("<script>window.hit = 1</script><img src='http://127.0.0.1:9/a.png' onerror='window.hit = 1'>")
    built.parts.append(
        "<link rel=stylesheet href='http://127.0.0.1:9/b.css'><iframe src='http://127.0.0.1:9/c'></iframe>"
    )
    file = tmp_path / "attacked.html"
    file.write_text(built.html(), encoding="utf-8")
    window.requested(), window.said()
    window.open(file)
    window.wait(DRAWN)
    refused = window.js("return fetch('http://127.0.0.1:9/d').then(() => 'fetched', () => 'refused')")
    assert refused == "refused" and window.js("return window.hit") is None
    said = " ".join(window.said())
    assert said.count("Content Security Policy") >= 4
    for name in ("a.png", "b.css", "/d"):
        assert name in said


def test_the_page_of_geometry_alone(window: Browser, made: Outcome, tmp_path: Path) -> None:
    geometry = made.folder.load_geometry()
    assert geometry is not None
    file = tmp_path / "geometry.html"
    file.write_text(geometry_page(geometry, SCRIPT), encoding="utf-8")
    window.said()
    window.open(file)
    window.wait(DRAWN)
    assert window.js("return document.querySelectorAll('.figure svg.main-svg').length") >= 4
    assert window.said() == [] and window.js("return window.hit") is None
