"""gpu-check says what it needs before it does anything, and can be run in parts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "python" / "benchmarks" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where its dataclass looks
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "missing", lambda: [])
    monkeypatch.setattr(module, "architecture", lambda: "90")
    monkeypatch.setenv("LATENTDEM_CUDA_ARCHS", "90")
    return module


def check(script, monkeypatch, folder, *only):
    """Exit code and summary of a run."""
    flags = [flag for name in only for flag in ("--only", name)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "-o", str(folder), *flags])
    with pytest.raises(SystemExit) as stop:
        script.main()
    return stop.value.code, json.loads((folder / "summary.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_names_what_is_missing(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "-o", tmp_path / "out"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert f"a GPU that torch {torch.__version__} can use" in run.stderr
    assert not (tmp_path / "out").exists()


def test_parts_are_merged_and_do_not_stop_each_other(script, monkeypatch, tmp_path):
    ran = []

    def part(name, passed=True, steps=1):
        def steps_of(folder):
            ran.append(name)
            return [script.Step(f"{name}-{i}", passed, 1.0, "") for i in range(steps)]

        monkeypatch.setattr(script, name, steps_of)

    for name in script.PARTS:
        part(name, passed=name != "build", steps=2)
    code, summary = check(script, monkeypatch, tmp_path, "tests", "build")
    assert code == 1 and ran == ["build", "tests"]
    assert list(summary["parts"]) == ["build", "tests"]
    assert not summary["passed"] and not summary["complete"]

    part("build")
    code, summary = check(script, monkeypatch, tmp_path, "build")
    assert code == 0 and summary["passed"] and not summary["complete"]
    assert [step["name"] for step in summary["parts"]["build"]] == ["build-0"]
    assert [step["name"] for step in summary["parts"]["tests"]] == ["tests-0", "tests-1"]

    ran.clear()
    code, summary = check(script, monkeypatch, tmp_path)
    assert code == 0 and summary["complete"] and ran == list(script.PARTS)


def test_a_step_that_fails_says_why(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "environment", lambda folder: {"PATH": ""})
    assert not script.run("a", ["/nonexistent/program"], tmp_path, 5).passed
    step = script.run("b", [sys.executable, "-c", "print('first\\nlast'); exit(3)"], tmp_path, 30)
    assert (step.passed, step.detail) == (False, "last")
    slow = script.run("c", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, 0.5)
    assert slow.detail == "not done within 0 s"
    given = [sys.executable, "-c", "import os; print(os.environ['LATENTDEM_GIVEN'])"]
    assert script.run("d", given, tmp_path, 30, {"LATENTDEM_GIVEN": "here"}).detail == "here"


def test_every_file_of_the_test_step_exists(script, monkeypatch, tmp_path):
    commands = []

    def note(name, command, folder, limit, extra=None):
        commands.append(command)
        return script.Step(name, True, 0.0, "")

    monkeypatch.setattr(script, "run", note)
    names = {step.name for step in script.tests(tmp_path)}
    assert len(names) == len(commands) >= 10
    assert {"tests-test_device_parity", "tests-test_blur_device", "tests-test_blur_cuda"} <= names
    assert all(Path(command[-1]).exists() for command in commands)
    for step in (script.build, script.benchmarks):
        step(tmp_path)
    assert all((SCRIPT.parents[2] / command[1]).exists() for command in commands[-5:])
