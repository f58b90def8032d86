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


VARIANTS = {
    "fast": "`--quality fast`",
    "65": "kernels of 65 pixels, noise 0.02",
}


def variants_table() -> str:
    """Other qualities on some of the pairs, beside the default on the same, and larger kernels."""
    standard = _load("quality_prox")
    lines = [
        "| | pairs | input | restored | gain | against the default | true kernel given | MNC "
        "| s / image |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, label in VARIANTS.items():
        document = _load(f"quality_{name}")
        if document is None:
            continue
        s, difference = document["summary"], ""
        if standard is not None and "quality" in document["setup"]:
            default = {(r["image"], r["kernel"]): r["psnr_blind"] for r in standard["rows"]}
            gains = [r["psnr_blind"] - default[r["image"], r["kernel"]] for r in document["rows"]]
            difference = f"{sum(gains) / len(gains):+.2f} dB"
        lines.append(
            f"| {label} | {s['pairs']} | {s['psnr_input']:.2f} dB | {s['psnr_blind']:.2f} dB "
            f"| {s['gain']:+.2f} ± {s['gain_std']:.2f} dB | {difference} "
            f"| {s['psnr_true_kernel']:.2f} dB | {s['mnc']:.3f} | {s['seconds_median']:.1f} |"
        )
    return "\n".join(lines)


def deblur_table() -> str:
    """Seconds and quality by method, quality and number format, on the same pairs in turn."""
    document = _load("deblur")
    if document is None:
        return "Not measured yet: `python python/benchmarks/bench_deblur.py`."
    lines = [
        f"| {len(document['pairs'])} pairs | networks in | s / image | time to the first row's "
        "| restored |",
        "|---|---|---|---|---|",
    ]
    for row, s in document["summary"].items():
        method, _, number_format = row.rpartition(", ")
        name, comma, rest = method.partition(",")
        lines.append(
            f"| `{name}`{comma}{rest} | {number_format} | {s['seconds']:.1f} | {s['ratio']:.2f}x "
            f"| {s['psnr']:.2f} dB |"
        )
    return "\n".join(lines)


def _speed_rows(folder: str, digits: int) -> list[str]:
    lines = ["| operator | case | native | baselines |", "|---|---|---|---|"]
    for name in ("blur", "deconv", "kernel_map", "volume_render"):
        document = _load(folder + name)
        for row in document["rows"] if document else []:
            times = dict(row["milliseconds"])
            key = next(iter(times))
            native = times.pop(key)
            others = ", ".join(
                f"{label} {value:.{digits}f} ms ({value / native:.1f}x)"
                for label, value in times.items()
            )
            lines.append(f"| {name} | {row['case']} | {native:.{digits}f} ms | {others} |")
    return lines


def _achieved(folder: str) -> list[str]:
    document = _load(f"{folder}blur")
    if document is None:
        return []
    limits = document["limits"]
    achieved = ", ".join(
        f"{rates['gflop_per_s']:.0f} GFLOP/s and {rates['gb_per_s']:.1f} GB/s"
        for rates in (row["achieved"] for row in document["rows"])
    )
    return [
        "",
        f"Achieved by the three blur cases: {achieved}; by a matrix product on that machine "
        f"{limits['matmul_gflop_per_s']:.0f} GFLOP/s, by a copy "
        f"{limits['copy_gb_per_s']:.1f} GB/s.",
    ]


def speed_table() -> str:
    """Operators against their named baselines."""
    return "\n".join(_speed_rows("", 1) + _achieved(""))


def gpu_speed_table() -> str:
    """The same on a GPU, from ``make gpu-check``."""
    document = _load("gpu/blur")
    if document is None:
        return "Not measured yet: `make gpu-check`."
    build = document["build"]
    head = f"{document['machine']}, torch {document['torch']}, {', '.join(build['cuda_archs'])}:"
    return "\n".join([head, "", *_speed_rows("gpu/", 2), *_achieved("gpu/")])


def roofline_table() -> str:
    """Each kernel beside the least time that its operations and its bytes would take."""
    document = _load("roofline")
    if document is None:
        return ""
    where = f"{document['threads']} threads, {document['build']['cpu_capability']}"
    lines = _roofline_lines(document, where, digits=1, floor_digits=1)
    if document["load_before"] > 0.5:
        lines += [
            "",
            f"**Measured beside other work (load {document['load_before']:.1f} before the start): "
            "these times and shares are worse than the kernels'. `make bench` on a quiet machine "
            "replaces them.**",
        ]
    return "\n".join(lines)


def gpu_roofline_table() -> str:
    """The same on a GPU, from ``make gpu-check``."""
    document = _load("gpu/roofline")
    if document is None:
        return "Not measured yet: `make gpu-check`."
    return "\n".join(_roofline_lines(document, document["machine"], digits=2, floor_digits=3))


def _roofline_lines(
    document: dict[str, Any], where: str, *, digits: int, floor_digits: int
) -> list[str]:
    product = document["limits"]["matmul_gflop_per_s"]
    copy = document["limits"]["copy_gb_per_s"]
    lines = [
        "| kernel | case | time | operations | bytes | FLOP / byte | GFLOP/s | GB/s "
        "| nearer limit | least time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        seconds = row["milliseconds"]["native"] / 1e3
        flop, moved = row["flop"], row["bytes"]
        rate, width = flop / seconds / 1e9, moved / seconds / 1e9
        bounds = {"arithmetic": flop / product / 1e6, "memory": moved / copy / 1e6}
        limit = max(bounds, key=lambda name: bounds[name])
        lines.append(
            f"| {row['kernel']} | {row['case']} | {seconds * 1e3:.{digits}f} ms "
            f"| {flop / 1e6:.0f} MFLOP | {moved / 1e6:.1f} MB | {flop / moved:.1f} "
            f"| {rate:.1f} ({rate / product:.0%}) | {width:.1f} ({width / copy:.0%}) | {limit} "
            f"| {bounds[limit]:.{floor_digits}f} ms |"
        )
    lines += [
        "",
        f"In brackets: of a matrix product, {product:.0f} GFLOP/s, and of a copy, {copy:.1f} GB/s, "
        f"in the same run ({where}).",
    ]
    return lines


def transforms_table() -> str:
    """Whole operators beside torch's bare transforms."""
    lines = ["| operator | case | whole operator | torch's transforms alone |", "|---|---|---|---|"]
    for name, operator in (("blur", "blur_gradients"), ("kernel_map", "kernel_map_update")):
        document = _load(name)
        for row in document["rows"] if document else []:
            times = row["milliseconds"]
            native, bare = next(iter(times.values())), times["ffts alone"]
            lines.append(
                f"| `{operator}` | {row['case']} | {native:.1f} ms "
                f"| {bare:.1f} ms ({bare / native:.2f}x) |"
            )
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


def objects_table() -> str:
    """Pose-free reconstruction: every row of the suite, by subset."""
    document = _load("quality_objects")
    if document is None:
        return "Not measured yet: `latentdem evaluate --suite objects`."
    lines: list[str] = []
    for subset, rows in document["summary"].items():
        cases = max(row["cases"] for row in rows.values())
        if lines:
            lines.append("")
        lines += [
            f"**{subset}** ({cases} cases)",
            "",
            "| method | rotation, median | < 5° | < 15° | < 30° | radius | PSNR | sampled | SSIM "
            "| IoU | chamfer | s | MB |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            cells = [
                _cell(row["rotation_median"], ".1f", "°"),
                *(_cell(row.get(f"below_{limit}"), ".0%") for limit in (5, 15, 30)),
                _cell(row["radius"], ".3f"),
                _cell(row["psnr"], ".2f", " dB"),
                _cell(row["psnr_sampled"], ".2f", " dB"),
                _cell(row["ssim"], ".3f"),
                _cell(row["iou"], ".3f"),
                _cell(row["chamfer"], ".4f"),
                _cell(row["seconds"], ".1f"),
                _cell(row["peak_mb"], ".0f"),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def priors_table() -> str:
    """What the two priors of deblurring know by themselves."""
    document = _load("quality_prior")
    if document is None:
        return "Not measured yet: `make evaluate-priors`."
    code, ranking = document["autoencoder"], document["ranking"]
    facts = {
        "autoencoder, round trip": f"{code['psnr']:.2f} dB",
        "the same, noise of 0.05 in the latents": f"{code['psnr_noisy_latents']:.2f} dB",
        "encode and decode 256 x 256": f"{code['milliseconds']:.0f} ms",
        f"sharp before blurred ({ranking['pairs']} pairs), by the loss": f"{ranking['plain']:.0%}",
        "sharp before blurred, by the label": _cell(ranking["label"], ".0%"),
    }
    facts |= {
        f"first kernel from {name}, MNC": f"{value:.3f}"
        for name, value in document["initialization"].items()
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    for title, key, head, form in (
        ("pixel noise", "denoising", "noise_std", ".2f"),
        ("estimate at t", "m_step", "timestep", ".3f"),
        ("taken for sharp, of noise", "sharpness", "noise_std", ".0%"),
    ):
        columns = [c for c in document[key][0] if c not in ("noise_std", "timestep")]
        lines += ["", f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for row in document[key]:
            cells = " | ".join(_cell(row[c], form) for c in columns)
            lines.append(f"| {row[head]:g} | {cells} |")
    return "\n".join(lines)


def baselines_table() -> str:
    """Other methods of deblurring beside ours, on the same pairs."""
    document = _load("quality_baselines")
    if document is None:
        return "Not measured yet: `make evaluate-baselines`."
    lines = [
        "| method | pairs | PSNR | gain | to `prox`, 95 % | SSIM | VIF | MNC | kernel RMSE "
        "| no blur | error ratio | networks | backward | s | MB |",
        "|---" * 15 + "|",
    ]
    for name, row in document["summary"].items():
        gap = ""
        if row["difference"] is not None and name != "prox":
            gap = (
                f"{row['difference']:+.2f} ({row['difference_low']:+.2f} to "
                f"{row['difference_high']:+.2f})"
            )
        cells = [
            str(row["pairs"]),
            _cell(row["psnr"], ".2f", " dB"),
            _cell(row["gain"], "+.2f"),
            gap,
            _cell(row["ssim"], ".3f"),
            _cell(row["vif"], ".3f"),
            _cell(row["mnc"], ".3f"),
            _cell(row["kernel_rmse"], ".4f"),
            _cell(row["share_no_blur"], ".0%"),
            _cell(row["error_ratio_median"], ".1f"),
            _cell(row["network_evaluations"], ".0f"),
            _cell(row["backward_passes"], ".0f"),
            _cell(row["seconds_median"], ".1f"),
            _cell(row["peak_mb"], ".0f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def operators_table() -> str:
    """Every forward model of ``deblur``."""
    document = _load("quality_operators")
    if document is None:
        return "Not measured yet: `make evaluate-operators`."
    lines = [
        "| | photographs | input | its model | any kernel | true parameters | MNC | s |",
        "|---" * 8 + "|",
    ]
    for name, row in document["summary"].items():
        cells = [
            str(row["photographs"]),
            _cell(row["psnr_input"], ".2f", " dB"),
            _cell(row["psnr_blind"], ".2f", " dB"),
            _cell(row["psnr_free"], ".2f", " dB"),
            _cell(row["psnr_true_kernel"], ".2f", " dB"),
            _cell(row["mnc"], ".3f"),
            _cell(row["seconds_median"], ".1f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def synthetic_table() -> str:
    """Over kernel sizes, noise and boundaries: rows of a size and boundary, columns of noise."""
    document = _load("quality_synthetic")
    if document is None:
        return "Not measured yet: `make evaluate-conditions`."
    cells: dict[str, dict[float, str]] = {}
    for name, row in document["summary"].items():
        told = next(r for r in document["rows"] if r["condition"] == name)
        label = f"{told['kernel_size']} px, {told['boundary']}"
        gap = row["psnr_blind"] - row["psnr_true_kernel"]
        cells.setdefault(label, {})[told["noise_std"]] = (
            f"{row['psnr_input']:.1f} → {row['psnr_blind']:.1f} dB ({gap:+.1f}), {row['mnc']:.2f}"
        )
    noises = sorted({noise for row in cells.values() for noise in row})
    pairs = min(row["pairs"] for row in document["summary"].values())
    lines = [
        f"| {pairs} pair{'s' if pairs > 1 else ''} each | "
        + " | ".join(f"noise {noise:g}" for noise in noises)
        + " |",
        "|---" * (1 + len(noises)) + "|",
    ]
    for label, row in cells.items():
        lines.append(f"| {label} | " + " | ".join(row.get(noise, "") for noise in noises) + " |")
    return "\n".join(lines)


def misspecified_table() -> str:
    """What it costs to be told a wrong kernel size or noise."""
    document = _load("quality_misspecified")
    if document is None:
        return "Not measured yet: `make evaluate-conditions`."
    lines = ["| told | pairs | input | restored | MNC | s |", "|---" * 6 + "|"]
    for name, row in document["summary"].items():
        lines.append(
            f"| {_what_was_told(document, name)} | {row['pairs']} | {row['psnr_input']:.2f} dB "
            f"| {row['psnr_blind']:.2f} dB | {row['mnc']:.3f} | {row['seconds_median']:.1f} |"
        )
    return "\n".join(lines)


def _what_was_told(document: dict[str, Any], name: str) -> str:
    row = next(r for r in document["rows"] if r["condition"] == name)
    if row["told_noise"] is None:
        return "nothing of the noise"
    if row["told_size"] != row["kernel_size"]:
        return f"{row['told_size']} px"
    if row["told_noise"] != row["noise_std"]:
        return f"noise {row['told_noise']:g}"
    return "the truth"


def batch_table() -> str:
    """Throughput of ``latentdem batch``, and where an image's milliseconds go."""
    document = _load("batch")
    if document is None:
        return "Not measured yet: `python python/benchmarks/bench_batch.py`."
    parts = ("compute", "read", "decode", "encode", "write", "manifest")
    lines = [
        "| engine | workers x threads | images/s | to a loop over `deblur` | start, s | "
        + " | ".join(f"{part}, ms" for part in parts)
        + " |",
        "|---" * (5 + len(parts)) + "|",
    ]
    for row in document["rows"]:
        if "engine" not in row:
            continue
        cells = [
            row["engine"],
            f"{row['workers']} x {row['threads_each']}",
            f"{row['images_per_second']:.3f}",
            f"{row['ratios']['loop / batch']:.2f}x",
            f"{row['start_seconds']:.1f}",
            f"{row['milliseconds']['compute']:.0f}",
            *(f"{row['milliseconds'][part]:.1f}" for part in parts[1:]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    manifest = document["rows"][-1]
    times = ", ".join(f"{what} {value:.2f} ms" for what, value in manifest["milliseconds"].items())
    images = next(row["case"] for row in document["rows"]).partition("workers 1, ")[2]
    best = max(
        (row for row in document["rows"] if "engine" in row),
        key=lambda row: row["images_per_second"],
    )
    spent, compute = best["milliseconds"], best["milliseconds"]["compute"]
    days = 1e6 / best["images_per_second"] / 86400
    rows = compute / manifest["milliseconds"]["run and done"]
    disk = 4 * compute / (spent["read"] + spent["write"])
    plan = (
        f"{images}; {manifest['case']}: {times}. A million such images would take {days:.0f} days "
        f"on this machine; the manifest keeps up with {rows:,.0f} such workers, the disk threads "
        f"with {disk:,.0f}."
    )
    return "\n".join([*lines, "", plan])


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


DOCUMENTS = {
    ROOT / "README.md": {
        "quality": quality_table,
        "variants": variants_table,
        "deblur": deblur_table,
        "speed": speed_table,
        "gpu_speed": gpu_speed_table,
    },
    ROOT / "latentdem_ext" / "PERFORMANCE.md": {
        "roofline": roofline_table,
        "gpu_roofline": gpu_roofline_table,
        "transforms": transforms_table,
    },
    ROOT / "csrc" / "README.md": {"cuda": cuda_table},
    ROOT / "python" / "latentdem" / "batch" / "README.md": {"batch": batch_table},
    ROOT / "python" / "README.md": {
        "quality_operators": operators_table,
        "quality_baselines": baselines_table,
        "quality_prior": priors_table,
        "quality_objects": objects_table,
    },
}


def render(document: Path) -> str:
    """Text of a document with fresh tables."""
    text = document.read_text()
    for name, table in DOCUMENTS[document].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        fresh = table()
        text, count = re.subn(pattern, lambda m, t=fresh: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{document.name} has no <!-- {name} --> markers")
    return text


def main() -> None:
    """Rewrite, or with ``--check`` compare."""
    for document in DOCUMENTS:
        fresh = render(document)
        if "--check" not in sys.argv:
            document.write_text(fresh)
        elif fresh != document.read_text():
            raise SystemExit(f"{document.name} is stale: run tables.py")


if __name__ == "__main__":
    main()
