"""The documents' figures come from the stored results, and their commands exist."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import latentdem_ext as ext
from latentdem.evaluate_synthetic import suite_conditions

ROOT = Path(__file__).resolve().parents[2]
PERFORMANCE = ROOT / "latentdem_ext" / "PERFORMANCE.md"
DOCUMENTS = [
    *ROOT.glob("*.md"),
    ROOT / "csrc/README.md",
    ROOT / "python/README.md",
    PERFORMANCE,
    *(ROOT / "docs").rglob("*.md"),
]


def test_tables_are_fresh():
    script = ROOT / "python" / "benchmarks" / "tables.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_tables_of_conditions_know_every_condition(monkeypatch):
    path = ROOT / "python" / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    summary = {
        "pairs": 2, "psnr_input": 19.04, "psnr_blind": 28.0, "psnr_true_kernel": 28.96,
        "mnc": 0.9, "seconds_median": 17.0,
    }  # fmt: skip

    def table(suite):
        conditions = suite_conditions(suite)
        document = {
            "rows": [{"condition": each.name, **asdict(each)} for each in conditions],
            "summary": {each.name: summary for each in conditions},
        }
        monkeypatch.setattr(tables, "_load", lambda name: document)
        return getattr(tables, f"{suite}_table")().splitlines()

    head, _, *rows = table("synthetic")
    assert head == "| 2 pairs each | noise 0 | noise 0.01 | noise 0.02 | noise 0.05 |"
    assert len(rows) == 8 and sum(row.count("19.0 → 28.0 dB (-1.0), 0.90") for row in rows) == 32
    told = [row.split(" | ")[0].removeprefix("| ") for row in table("misspecified")[2:]]
    assert told == [
        "nothing of the noise", "13 px", "19 px", "the truth", "37 px", "49 px",
        "noise 0.005", "noise 0.0075", "noise 0.015", "noise 0.02",
    ]  # fmt: skip


def test_the_cuda_report_knows_every_kernel():
    report = json.loads((ROOT / "python/benchmarks/results/cuda.json").read_text())
    heads = r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)"
    kernels = {
        name
        for path in (ROOT / "csrc").rglob("*.cu")
        for name in re.findall(heads, path.read_text())
    }
    assert {kernel["name"].split("<")[0] for kernel in report["kernels"]} == kernels, (
        "results/cuda.json is stale: run make cuda-report"
    )
    assert not any(kernel["spilled_bytes"] for kernel in report["kernels"])


def test_make_targets_named_in_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for document in DOCUMENTS:
        for target in re.findall(r"(?:`|\$ )make ([a-z-]+)[`\s]", document.read_text()):
            assert target in targets, f"{document.name}: make {target}"


def test_one_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    assert ext.build_info()["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_links_in_documents_lead_somewhere():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_performance_is_told_without_typed_figures():
    """Measured numbers go stale in prose; those between the markers are made."""
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", PERFORMANCE.read_text(), flags=re.S)
    unit = r"(?:%|x\b|\s?(?:ms|s|[GM]i?B|[GM]FLOP|GB/s|times|percent)\b)"
    assert not re.findall(rf"\d(?:\.\d+)?{unit}", prose)
    assert re.findall(rf"\d(?:\.\d+)?{unit}", "3.5 ms, 12 GB/s, 7% and 2.1x") == [
        "3.5 ms",
        "2 GB",
        "7%",
        "2.1x",
    ]


def test_every_hot_kernel_has_its_bounds():
    table = PERFORMANCE.read_text().split("<!-- roofline -->")[1].split("<!-- /roofline -->")[0]
    for kernel in (
        "`blur_gradients`",
        "`blur_conv2d`, direct",
        "`blur_conv2d`, spectral",
        "`kernel_map_update`",
        "`wiener_deconv2d`",
        "`volume_render`, forward",
        "`volume_render`, backward",
    ):
        assert kernel in table
