"""README's figures come from the stored results, and its commands exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import latentdem_ext as ext

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_fresh():
    script = ROOT / "python" / "benchmarks" / "tables.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\bmake ([a-z-]+)[`\s]", (ROOT / name).read_text()):
            assert target in targets, f"{name}: make {target}"


def test_one_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    assert ext.build_info()["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_links_in_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), ROOT / "csrc/README.md", ROOT / "python/README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
