"""Rewrite the tables between the markers of the documents from ``results/*.json``.

``--check`` only compares, for the tests.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parents[2]


def _load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def quality_table() -> str:
    """Quality of both methods beside their floor and ceilings."""
    lines = [
        "| method | pairs | input | restored | gain | true kernel given | round trip | MNC "
        "| s / image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in ("prox", "paper"):
        document = _load(f"quality_{method}")
        if document is None:
            continue
        s = document["summary"]
        lines.append(
            f"| `{method}` | {s['pairs']} | {s['psnr_input']:.2f} dB | {s['psnr_blind']:.2f} dB "
            f"| {s['gain']:+.2f} ± {s['gain_std']:.2f} dB | {s['psnr_true_kernel']:.2f} dB "
            f"| {s['psnr_round_trip']:.2f} dB | {s['mnc']:.3f} | {s['seconds_median']:.1f} |"
        )
    return "\n".join(lines)


def speed_table() -> str:
    """Operators against their named baselines."""
    lines = ["| operator | case | native | baselines |", "|---|---|---|---|"]
    for name in ("blur", "deconv", "kernel_map", "volume_render"):
        document = _load(name)
        for row in document["rows"] if document else []:
            times = dict(row["milliseconds"])
            key = next(iter(times))
            native = times.pop(key)
            others = ", ".join(
                f"{label} {value:.1f} ms ({value / native:.1f}x)" for label, value in times.items()
            )
            lines.append(f"| {name} | {row['case']} | {native:.1f} ms | {others} |")
    document = _load("blur")
    if document is not None:
        limits = document["limits"]
        achieved = ", ".join(
            f"{rates['gflop_per_s']:.0f} GFLOP/s and {rates['gb_per_s']:.1f} GB/s"
            for rates in (row["achieved"] for row in document["rows"])
        )
        lines += [
            "",
            f"Achieved by the three blur cases: {achieved}; by a matrix product on that machine "
            f"{limits['matmul_gflop_per_s']:.0f} GFLOP/s, by a copy "
            f"{limits['copy_gb_per_s']:.1f} GB/s.",
        ]
    return "\n".join(lines)


def cuda_table() -> str:
    """What is known of the CUDA kernels without a GPU."""
    document = _load("cuda")
    if document is None:
        raise SystemExit("results/cuda.json is missing: run cuda_report.py")
    registers = {(k["name"], k["architecture"]): k["registers"] for k in document["kernels"]}
    architectures = {name: d["architecture"] for name, d in document["devices"].items()}
    lines = ["| call | at least | kernels: registers, occupancy |", "|---|---|---|"]

    def both(values: dict[str, str]) -> str:
        return " / ".join(values[name] for name in architectures)

    for row in document["rows"]:
        bound = both({name: f"{row['milliseconds'][name]:.2f}" for name in architectures})
        kernels = {}
        for launch in row["launches"]:
            name = launch["kernel"]
            used = both({d: str(registers[name, a]) for d, a in architectures.items()})
            occupancy = both({d: f"{launch['occupancy'][d]:.0%}" for d in architectures})
            kernels[f"`{name}` {used}, {occupancy}"] = None
        lines.append(f"| {row['case']} | {bound} ms | {'; '.join(kernels)} |")
    lines += ["", f"Each pair: {both({name: name for name in architectures})}."]
    return "\n".join([*lines, "", *(f"- {text}" for text in document["assumptions"])])


TABLES = {
    "README.md": {"quality": quality_table, "speed": speed_table},
    "csrc/README.md": {"cuda": cuda_table},
}


def render(document: str, text: str) -> str:
    """The document with fresh tables."""
    for name, table in TABLES[document].items():
        pattern, fresh = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", table()
        text, count = re.subn(pattern, lambda m, t=fresh: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{document} has no <!-- {name} --> markers")
    return text


def main() -> None:
    """Rewrite, or with ``--check`` compare."""
    for document in TABLES:
        text = (ROOT / document).read_text()
        fresh = render(document, text)
        if "--check" not in sys.argv:
            (ROOT / document).write_text(fresh)
        elif fresh != text:
            raise SystemExit(f"{document} is stale: run tables.py")


if __name__ == "__main__":
    main()
