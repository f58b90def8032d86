"""A page of figures and pictures from a suite's results: look at the worst first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
 body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
 table { border-collapse: collapse; margin: 1rem 0 }
 td, th { padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums }
 td:first-child, th:first-child { text-align: left }
 figure { margin: 2rem 0 } img { max-width: 100% }
 .failed { color: #a00 }
</style>
<h1>{{ title }}</h1>
<p>{{ introduction }}</p>
<table>
{% for name, value in summary.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% for entry in entries %}<figure>
<figcaption><b>{{ entry.name }}</b>
{% if entry.failure %}<span class="failed">{{ entry.failure }}</span>
{% else %}{% for name, value in entry.figures.items() %}
{{ name }} {{ value }}{{ "," if not loop.last }}
{% endfor %}{% endif %}</figcaption>
{% if entry.picture %}
<img src="{{ entry.picture }}" alt="{{ entry.name }}" loading="lazy">
{% endif %}
</figure>
{% endfor %}</html>
"""


@dataclass(frozen=True)
class Entry:
    """One case of the page.

    Args:
        name: its heading.
        figures: formatted figures by name.
        picture: its file, or none.
        failure: why there are no figures.
    """

    name: str
    figures: dict[str, str] = field(default_factory=dict)
    picture: Path | None = None
    failure: str = ""


def write_page(
    path: Path,
    *,
    title: str,
    introduction: str,
    summary: dict[str, str],
    entries: Sequence[Entry],
) -> Path:
    """Write ``path``; pictures are linked relative to it, all text is escaped.

    >>> write_page(path, title="T", introduction="", summary={}, entries=[])  # doctest: +SKIP
    """
    environment = Environment(autoescape=True)
    shown = [
        {
            "name": entry.name,
            "figures": entry.figures,
            "failure": entry.failure,
            "picture": None if entry.picture is None else _link(entry.picture, path.parent),
        }
        for entry in entries
    ]
    text = environment.from_string(_PAGE).render(
        title=title, introduction=introduction, summary=summary, entries=shown
    )
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
    return path


def _link(picture: Path, folder: Path) -> str:
    """A relative address, so that the folder can be moved; no character of a name has a meaning."""
    return quote(Path(os.path.relpath(picture, folder)).as_posix())
