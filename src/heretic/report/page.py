"""One offline HTML page with figures: everything inlined, all text escaped, no network and no foreign scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources

from heretic._version import __version__
from heretic.report.figures import Figure


@dataclass
class Page:
    """A page that is built from top to bottom, from text, never markup.

    A choice is a control (slider or list) that selects the visible variant of every figure and block in its group.
    """

    title: str
    parts: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, object]] = field(default_factory=dict)
    choices: dict[str, dict[str, object]] = field(default_factory=dict)

    def section(self, heading: str, *paragraphs: str) -> None:
        """Start a section."""
        self.parts.append(f'</section><section id="section-{len(self.headings)}"><h2>{escape(heading)}</h2>')
        self.headings.append(heading)
        self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        self.parts += [f"<p>{escape(text)}</p>" for text in paragraphs if text]

    def facts(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Add names and values."""
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs)
        self.parts.append(f"<dl>{rows}</dl>")

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[object]], marked: int | None = None) -> None:
        """Add a table with the row `marked` highlighted."""
        head = "".join(f"<th>{escape(h)}</th>" for h in headings)
        body = "".join(
            f"<tr{' class=marked' if i == marked else ''}>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>"
            for i, row in enumerate(rows)
        )
        self.parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def details(self, summary: str, text: str) -> None:
        """Add preformatted text in a collapsed element."""
        self.parts.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>")

    def figure(self, name: str, variants: Sequence[Figure | None], choice: str = "", height: int = 380) -> None:
        """Add a figure, or variants selected by a choice; None draws nothing."""
        self.figures[name] = {"variants": list(variants), "choice": choice}
        self.parts.append(f'<div class="figure" id="figure-{escape(name)}" style="height:{height}px"></div>')

    def slider(self, choice: str, heading: str, labels: Sequence[str], selected: int) -> None:
        """Add a slider for a choice."""
        self.choices[choice] = {"labels": list(labels), "selected": selected}
        self.parts.append(
            f'<label class="choice">{escape(heading)} <input type="range" data-choice="{escape(choice)}" min="0" '
            f'max="{len(labels) - 1}" value="{selected}"> <output data-label="{escape(choice)}"></output></label>'
        )

    def select(self, choice: str, heading: str, labels: Sequence[str], selected: int, numbers: Sequence[int]) -> None:
        """Add a list for a choice; clicking a point of the figure `front` with one of the numbers selects it too."""
        self.choices[choice] = {"labels": list(labels), "selected": selected, "numbers": list(numbers)}
        options = "".join(
            f"<option value={i}{' selected' if i == selected else ''}>{escape(label)}</option>"
            for i, label in enumerate(labels)
        )
        self.parts.append(
            f'<label class="choice">{escape(heading)} <select data-choice="{escape(choice)}">{options}</select></label>'
        )

    def block(self, choice: str, index: int, pairs: Iterable[tuple[str, object]]) -> None:
        """Add names and values that are visible while the choice has this index."""
        self.parts.append(f'<div data-block="{escape(choice)}" data-index="{index}" hidden>')
        self.facts(pairs)
        self.parts.append("</div>")

    def html(self) -> str:
        """Return the whole file."""
        content = {"figures": self.figures, "choices": self.choices}
        data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        scripts = (_plotly(), _own("page.js"))
        links = "".join(f'<a href="#section-{i}">{escape(h)}</a>' for i, h in enumerate(self.headings))
        policy = (
            f"default-src 'none'; script-src {' '.join(map(_source, scripts))}; style-src 'unsafe-inline'; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'"
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">'
            f"<title>{escape(self.title)}</title><style>{_own('page.css')}</style></head>\n"
            f"<body><header><h1>{escape(self.title)}</h1><nav>{links}</nav></header><main><section>"
            + "\n".join(self.parts)
            + f"</section></main>\n<footer>Made by heretic {__version__}. This file needs no network and holds no "
            "prompt texts unless requested.</footer>\n"
            f'<script type="application/json" id="content">{data}</script>\n'
            + "\n".join(f"<script>{script}</script>" for script in scripts)
            + "</body></html>\n"
        )


def _source(script: str) -> str:
    """The source expression of an inline script in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("\r\n", "\n")


@functools.cache
def _own(name: str) -> str:
    return (resources.files("heretic") / "report" / name).read_text(encoding="utf-8")
