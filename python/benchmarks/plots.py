"""Draw ``results/scaling.json`` as ``results/scaling.svg``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """One panel for each operator and sweep, both axes logarithmic."""
    document = json.loads((RESULTS / "scaling.json").read_text())
    rows = document["rows"]
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    matplotlib.rcParams["svg.hashsalt"] = "latentdem"  # the same file from the same figures
    figure, axes = plt.subplots(
        len(operators), len(sweeps), figsize=(11, 6), squeeze=False, layout="constrained"
    )
    for operator, line in zip(operators, axes, strict=True):
        for sweep, panel in zip(sweeps, line, strict=True):
            points = [r for r in rows if (r["operator"], r["sweep"]) == (operator, sweep)]
            for name in points[0]["milliseconds"]:
                panel.loglog(
                    [p["value"] for p in points],
                    [p["milliseconds"][name] for p in points],
                    marker="o",
                    label=name,
                )
            panel.set_xlabel(sweep)
            panel.set_ylabel("milliseconds")
            panel.set_title(operator)
            panel.grid(True, which="both", alpha=0.3)
            panel.legend()
    figure.suptitle(f"{document['threads']} threads, torch {document['torch']}")
    figure.savefig(RESULTS / "scaling.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
