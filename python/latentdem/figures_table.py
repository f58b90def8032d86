"""Tables of figures in a terminal: a narrow one gets fewer of them, and those whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One figure of each row.

    Args:
        heading: above it.
        cell: what is printed of a row's summary.
        main: whether a narrow terminal shows it, too.
    """

    heading: str
    cell: Callable[[dict[str, Any]], str]
    main: bool = True


def figure(heading: str, key: str, form: str, *, main: bool = True) -> Column:
    """The column of the number ``key``; nothing where there is none."""

    def cell(row: dict[str, Any]) -> str:
        value = row.get(key)
        return "" if value is None else format(value, form)

    return Column(heading, cell, main)


def figures_table(
    title: str, columns: Sequence[Column], rows: Mapping[str, dict[str, Any]], *, width: int
) -> Table:
    """``rows`` by their names, with all columns, or the main ones where ``width`` is too small.

    Args:
        title: above the table.
        columns: in their order; the main ones should fit into 80 characters, beside short names.
        rows: summaries by name, which is the first column.
        width: of the terminal, in characters.

    >>> columns = figure("PSNR", "psnr", ".2f"), figure("SSIM", "ssim", ".3f", main=False)
    >>> rows = {"prox": {"psnr": 27.0, "ssim": 0.8}}
    >>> [len(figures_table("", columns, rows, width=width).columns) for width in (80, 20)]
    [3, 2]
    """
    table = _table(title, columns, rows)
    console = Console(width=1000)
    if console.measure(table).maximum > width:
        table = _table(title, [column for column in columns if column.main], rows)
    return table


def _table(title: str, columns: Sequence[Column], rows: Mapping[str, dict[str, Any]]) -> Table:
    table = Table(title=title)
    # Names may take several lines: figures may not.
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(column.cell(row) for column in columns))
    return table
