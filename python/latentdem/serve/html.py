"""Pieces of the page: the line of progress, tables of facts, style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from latentdem.serve.jobs import Snapshot

CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto !important}
.gradio-container .prose h1 {margin: 0 0 .2rem; font-size: 1.6rem}
.hint {color: var(--body-text-color-subdued); margin: 0}
.note {border-left: 3px solid var(--border-color-primary); padding: .1rem 0 .1rem .8rem;
  margin: .4rem 0; color: var(--body-text-color)}
.note.error {border-color: #dc2626}
.note.warning {border-color: #d97706}
.welcome {border: 1px dashed var(--border-color-primary); border-radius: 8px;
  padding: 1.2rem 1.4rem; color: var(--body-text-color-subdued)}
.welcome b {color: var(--body-text-color)}
.welcome ol {margin: .5rem 0 0; padding-left: 1.2rem; list-style: decimal}
.progress-line {display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem 1rem;
  font-variant-numeric: tabular-nums; color: var(--body-text-color)}
.progress-line span + span {color: var(--body-text-color-subdued)}
.track {height: 6px; border-radius: 3px; margin-top: .45rem; overflow: hidden;
  background: var(--border-color-primary)}
.track i {display: block; height: 100%; background: var(--color-accent); transition: width .4s}
.track.unknown i {width: 25%; animation: latentdem-slide 1.6s ease-in-out infinite alternate}
@keyframes latentdem-slide {from {margin-left: 0} to {margin-left: 75%}}
@media (prefers-reduced-motion: reduce) {
  .track.unknown i {animation: none; width: 100%; opacity: .4}
}
.prose table.facts {width: 100%; border: 0; border-collapse: collapse; margin: 0;
  font-variant-numeric: tabular-nums; color: var(--body-text-color)}
.prose table.facts td, .prose table.facts th {padding: .4rem .9rem .4rem 0; text-align: left;
  border: 0; border-bottom: 1px solid var(--border-color-primary); vertical-align: top;
  background: none; white-space: nowrap}
.prose table.facts th {font-weight: 600}
.prose table.facts tr {border: 0; background: none}
.prose table.facts tbody tr:last-child td {border-bottom: 0}
.prose table.facts td:first-child {color: var(--body-text-color-subdued); white-space: normal;
  overflow-wrap: anywhere; min-width: 4.5em}
.hide-container > .html-container {padding: 0 !important}
.phases {color: var(--body-text-color-subdued); margin: .9rem 0 0; line-height: 1.7}
.phases b {color: var(--body-text-color)}
#deblur-live [data-testid=block-label], #deblur-slider [data-testid=block-label],
#deblur-kernel [data-testid=block-label], #sheet [data-testid=block-label],
#turntable [data-testid=block-label]
  {position: static; border: 0; box-shadow: none; background: none; padding: .35rem .6rem}
#deblur-live img {width: 100%; max-height: 500px; object-fit: contain}
#deblur-kernel img {width: 100%; max-height: 256px; object-fit: contain; background: #000}
#turntable img {width: 100%; height: 272px; object-fit: contain; background: #fff}
.pixels img {image-rendering: pixelated}
.downloads {gap: .5rem !important; flex-wrap: wrap}
.downloads > * {flex: 0 1 auto !important; min-width: 0 !important}
.examples {gap: .5rem !important; align-items: center}
.examples > * {flex: 0 1 auto !important; min-width: 0 !important; width: auto !important}
"""
"""For light and dark; all colours but two are the theme's."""


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(75.4)
    '1:15'
    """
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


class Pace:
    """How long it takes yet, from how fast it went since the first report.

    What comes before it, loading and the first kernel, says nothing about the rest.

    >>> pace = Pace()
    >>> pace.add(0.1, 30.0), pace.add(0.2, 40.0), pace.left(42.0)
    (None, None, 'about 1:18 left')
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def add(self, share: float, seconds: float) -> None:
        """``share`` was done after ``seconds``."""
        self._last = share, seconds
        if self._first is None:
            self._first = self._last

    def left(self, seconds: float) -> str:
        """In words, ``seconds`` after the start; empty where nobody can tell."""
        if self._first is None or self._last[0] <= self._first[0]:
            return ""
        share, at = self._last
        each = (at - self._first[1]) / (share - self._first[0])
        return f"about {clock(max(0.0, each * (1 - share) - (seconds - at)))} left"


def note(text: str, kind: str = "") -> str:
    """A line with a bar at its side; ``kind``: error, warning or nothing."""
    role = ' role="alert"' if kind else ""
    return f'<p class="note {kind}"{role}>{escape(text)}</p>'


def progress(text: str, seconds: float, share: float | None, left: str) -> str:
    """What is being done, how long since, how long yet, and a bar; ``share`` None: unknown."""
    times = f"{clock(seconds)} so far" + (f", {left}" if left else "")
    width = "" if share is None else f' style="width:{100 * share:.0f}%"'
    unknown = " unknown" if share is None else ""
    return (
        f'<div role="status"><div class="progress-line"><span>{escape(text)}</span>'
        f'<span>{escape(times)}</span></div><div class="track{unknown}"><i{width}></i></div></div>'
    )


def phases(names: Sequence[str], now: str) -> str:
    """What is done one after the other, what is done now in bold."""
    items = (f"<b>{escape(n)}</b>" if n == now else escape(n) for n in names)
    return f'<p class="phases">{"<br>".join(items)}</p>'


def waiting(snapshot: Snapshot) -> str:
    """Its place in the queue."""
    before = "one request" if snapshot.ahead == 1 else f"{snapshot.ahead} requests"
    text = f"Waiting: {before} before this one" if snapshot.ahead else "Starting"
    return (
        f'<div role="status"><div class="progress-line"><span>{text}</span></div>'
        '<div class="track unknown"><i></i></div></div>'
    )


def ending(snapshot: Snapshot, limit: float) -> str:
    """Why a job ended without a result."""
    if snapshot.state == "cancelled":
        return note("Cancelled; nothing is computed any more.")
    if snapshot.state == "late":
        return note(
            f"Stopped: it took longer than the {limit:g} seconds that this server allows. Shrink "
            "the picture, take fewer steps, or start the server with a larger --time-limit.",
            "error",
        )
    return note(snapshot.message, "error")


def facts(rows: Sequence[tuple[str, ...]], head: Sequence[str] = ()) -> str:
    """A table; all text is escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return (
        f'<table class="facts">{top}<tbody>{"".join(line(r, "td") for r in rows)}</tbody></table>'
    )


def welcome(title: str, steps: Sequence[str]) -> str:
    """What the empty half of the page says before the first run."""
    items = "".join(f"<li>{escape(step)}</li>" for step in steps)
    return f'<div class="welcome"><b>{escape(title)}</b><ol>{items}</ol></div>'
