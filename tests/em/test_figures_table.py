"""Tables of figures: a narrow terminal gets fewer of them, and none is cut."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from latentdem import (
    evaluate_baselines,
    evaluate_objects,
    evaluate_operators,
    evaluate_synthetic,
)
from latentdem.figures_table import figure, figures_table

RESULTS = Path(__file__).resolve().parents[2] / "python/benchmarks/results"


def printed(columns, rows, width):
    console = Console(width=width, file=StringIO())
    console.print(figures_table("title", columns, rows, width=width))
    return console.file.getvalue()


def synthetic_row():
    keys = "psnr_input psnr_blind gain gain_low gain_high psnr_true_kernel ssim_blind vif_blind mnc"
    return dict.fromkeys((*keys.split(), "share_no_blur", "seconds_median"), 12.5) | {"pairs": 32}


def stored(name):
    return json.loads((RESULTS / f"quality_{name}.json").read_text())["summary"]


@pytest.mark.parametrize(
    ("columns", "rows", "left_out"),
    [
        (evaluate_baselines.COLUMNS, stored("baselines"), "SSIM"),
        (evaluate_synthetic.COLUMNS, {"65 px, sigma 0.02, valid": synthetic_row()}, "SSIM"),
        (evaluate_operators.COLUMNS, stored("operators"), "input"),
        (evaluate_objects.COLUMNS, stored("objects")["pairs"], "chamfer"),
    ],
    ids=["baselines", "synthetic", "operators", "objects"],
)
def test_eighty_columns_hold_the_main_figures(columns, rows, left_out):
    wide, narrow = printed(columns, rows, 160), printed(columns, rows, 80)
    for text, width in ((wide, 160), (narrow, 80)):
        assert "\u2026" not in text
        assert max(map(len, text.splitlines())) <= width
        for row in rows.values():
            shown = [each.cell(row) for each in columns if text is wide or each.main]
            assert all(cell in text for cell in shown)
    assert left_out in wide and left_out not in narrow


def test_what_is_missing_is_empty():
    (column,) = [figure("PSNR", "psnr", ".2f")]
    assert [column.cell(row) for row in ({}, {"psnr": None}, {"psnr": 1.234})] == ["", "", "1.23"]
