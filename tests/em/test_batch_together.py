"""Workers that restore images of one size together: each stays by itself all the same."""

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from em.batch_stand_in import make_folder, picture, picture_name, results, wait_for
from PIL import Image
from typer.testing import CliRunner

import latentdem
from latentdem.batch import Options, WorkerLost, run_batch
from latentdem.batch import run as driver
from latentdem.batch.engines import LocalEngine
from latentdem.batch.request import Requests, digest
from latentdem.batch.worker import Setup, Task, Worker
from latentdem.cli import app
from latentdem.em.result import DeblurResult

QUICK = Options(kernel_size=5, steps=1)


def task(name, side=16, **options):
    stream = BytesIO()
    picture(name, side, side).save(stream, "PNG")
    request = Requests(QUICK, "cpu")._common | options
    alone = request.pop("alone", False)
    return Task(str(name), f"{name}.png", stream.getvalue(), request, digest(request), alone=alone)


class Solver:
    """A stand-in that waits for a sign before it does its first image; keeps what came together."""

    def __init__(self, fatal=()):
        self.go, self.batches, self.fatal = threading.Event(), [], set(fatal)

    def __call__(self, images, *, batch_size=1, progress, **options):
        names = [picture_name(image[None]) for image in images]
        self.batches.append(names)
        assert batch_size == len(images) and options["dtype"] is None
        while not self.go.wait(0.01):
            progress()
        if self.fatal & set(names):
            raise RuntimeError(f"the stand-in fails with {min(self.fatal & set(names))}")
        report = {"seconds": 1.0, "kernel_sizes": [5] * len(images)}
        return DeblurResult(images.flip(-2), torch.ones(len(images), 1, 5, 5), images,
                            [[]] * len(images), report)  # fmt: skip


def compute(solver, tasks, batch_size=3, **options):
    """Outcomes of tasks that all wait while the first one is computed."""
    setup = Setup(solve=solver, batch_size=batch_size, threads=1, **options)
    worker = Worker(setup)
    with ThreadPoolExecutor(len(tasks)) as threads:
        futures = []
        for number, each in enumerate(tasks):
            futures.append(threads.submit(worker.run, each))
            # The first one is on its way before there is a second.
            wait_for(lambda n=number: len(solver.batches) == 1 and len(worker._waiting) == n, 20)
        solver.go.set()
        found = [future.result() for future in futures]
    worker.stop()
    return found


def test_what_waits_is_restored_together_if_it_is_alike():
    solver = Solver()
    tasks = [task(1), task(2), task(3, side=20), task(4), task(5, seed=3), task(6), task(7),
             task(8, method="paper"), task(9, alone=True), task(10, side=20)]  # fmt: skip
    found = compute(solver, tasks)
    assert solver.batches == [["1"], ["2", "4", "6"], ["3", "10"], ["5"], ["7"], ["8"], ["9"]]
    for each, outcome in zip(tasks, found, strict=True):
        assert outcome.reason is None and sorted(outcome.files) == sorted(
            ["restored.png", "kernel.png", "kernel.npy", "comparison.png", "report.json"]
        )
        # Everyone's own picture, upside down, and own request.
        report = json.loads(outcome.files["report.json"])
        assert report["input"] == each.input and report["request_digest"] == each.digest
        assert report["kernel_sizes"] == [5]
        restored = np.asarray(Image.open(BytesIO(outcome.files["restored.png"])))
        assert restored[-1, 0, 0] == int(each.id)


def test_compiled_batches_are_whole_or_powers_of_two():
    solver = Solver()
    compute(solver, [task(n) for n in range(1, 12)], batch_size=6, compile="default")
    assert [len(batch) for batch in solver.batches] == [1, 6, 4]
    compute(solver := Solver(), [task(n) for n in range(1, 5)], batch_size=6, compile="default")
    assert [len(batch) for batch in solver.batches] == [1, 2, 1]


def test_one_that_fails_takes_no_mate_with_it():
    solver = Solver(fatal="4")
    found = compute(solver, [task(1), task(2), task(4), task(6)])
    assert solver.batches == [["1"], ["2", "4", "6"], ["2"], ["4"], ["6"]]
    reasons = [outcome.reason for outcome in found]
    assert reasons == [None, None, "RuntimeError: the stand-in fails with 4", None]


def test_a_stopped_worker_lets_nobody_wait():
    solver = Solver()
    worker = Worker(Setup(solve=solver, batch_size=2, threads=1))
    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(worker.run, task(n)) for n in (1, 2, 3)]
        known = wait_for(lambda: len(worker._waiting) + sum(map(len, solver.batches)) == 3)
        worker.stop()
        assert known
        assert [type(future.exception(10)).__name__ for future in futures] == ["_Stopped"] * 3


def test_a_worker_holds_two_batches():
    assert Setup().depth == 2 and Setup(batch_size=3).depth == 6
    assert Setup(batch_size="auto").depth == 2
    assert Setup(batch_size="auto", device="cuda:1").depth == 32


class Fragile(LocalEngine):
    """Its worker dies with the first three images, each once."""

    def __init__(self, setup):
        super().__init__(setup)
        self.sent, self.lost = [], set()

    def submit(self, each):
        self.sent.append((each.id, each.alone))
        if len(self.lost | {each.id}) <= 3 and not each.alone:
            self.lost.add(each.id)
            future = Future()
            future.set_exception(WorkerLost("process 7 ended with code -9"))
            return future
        return super().submit(each)


def test_what_a_worker_died_with_is_tried_alone(tmp_path, monkeypatch):
    engines = []

    def make(name, workers, device, threads, setup, address):
        engines.append(Fragile(Setup(threads=threads, **setup)))
        return engines[0]

    monkeypatch.setattr(driver, "make_engine", make)
    solver = Solver()
    solver.go.set()
    photos = make_folder(tmp_path / "photos", count=4)
    found = run_batch([photos], tmp_path / "out", QUICK, solve=solver, threads=1, batch_size=2)
    assert (found.done, found.failed) == (4, 0)
    assert len(engines[0].lost) == 3
    assert {name for name, alone in engines[0].sent if alone} == engines[0].lost


def test_same_as_one_by_one(tmp_path):
    """Also by the command, which takes the number or ``auto``."""
    photos = make_folder(tmp_path / "photos", count=4, side=40)
    asked = replace(QUICK, dtype="fp32")
    one = run_batch([photos], tmp_path / "one", asked, threads=1)
    several = run_batch([photos], tmp_path / "several", asked, threads=1, batch_size=4)
    assert (one.done, several.done, several.failed) == (4, 4, 0)
    left, right = results(tmp_path / "one"), results(tmp_path / "several")
    assert left.keys() == right.keys()
    for path in (tmp_path / "one").rglob("restored.png"):
        other = tmp_path / "several" / path.relative_to(tmp_path / "one")
        pictures = [np.asarray(Image.open(each)).astype(int) for each in (path, other)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
        kernels = [np.load(each.with_name("kernel.npy")) for each in (path, other)]
        assert np.allclose(*kernels, atol=1e-4)
        requests = [
            json.loads(each.with_name("report.json").read_text())["request_digest"]
            for each in (path, other)
        ]
        # So that a run goes on with another batch size.
        assert requests[0] == requests[1]
    command = ["batch", str(photos), "-o", str(tmp_path / "several"), "--kernel-size", "5",
               "--steps", "1", "--dtype", "fp32", "--threads", "1", "--batch-size"]  # fmt: skip
    found = CliRunner().invoke(app, [*command, "auto"])
    assert found.exit_code == 0 and "4 done (4 of them before)" in found.output
    found = CliRunner().invoke(app, [*command, "0"])
    assert found.exit_code == 1 and "batch_size must be at least 1, or 'auto'" in found.output
    found = CliRunner().invoke(app, [*command[:-1], "--dtype", "fp8"])
    assert found.exit_code == 1 and "dtype must be fp32, fp16 or bf16" in found.output
    found = CliRunner().invoke(app, [*command[:-1], "--compile", "fast"])
    assert found.exit_code == 1 and "compile must be one of" in found.output


def test_another_format_is_another_request():
    plain, half = (digest(Requests(o, "cpu")._common) for o in (QUICK, Options(dtype="bf16")))
    assert plain != half and "dtype" not in Requests(QUICK, "cpu")._common


def test_results_of_a_batch_are_those_of_its_images():
    images = torch.rand(3, 3, 40, 44)
    together = latentdem.deblur(images, steps=1, batch_size=3)
    sizes = together.report["kernel_sizes"]
    for index, one in enumerate(together.split()):
        alone = latentdem.deblur(images[index], steps=1)
        assert torch.allclose(one.image, alone.image, atol=1e-3)
        assert one.kernel.shape[-1] == alone.kernel.shape[-1] == sizes[index]
        assert one.report.keys() == alone.report.keys()
        different = {
            name
            for name, value in one.report.items()
            if value != alone.report[name] and not name.startswith(("seconds", "peak", "residual"))
        }
        assert different == set()
        assert len(one.history) == len(one.observation) == 1


@pytest.mark.parametrize("flag", ["--slicing", "--tiling"])
def test_command_in_little_memory(tmp_path, flag):
    picture(1, 40, 40).save(tmp_path / "x.png")
    command = ["deblur", str(tmp_path / "x.png"), "-o", str(tmp_path / "out"), "--kernel-size",
               "5", "--steps", "1", "--dtype", "bf16", flag]  # fmt: skip
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dtype"] == "bfloat16" and report["request"]["dtype"] == "bf16"
    again = CliRunner().invoke(app, command).output
    assert "already done" in " ".join(again.split())
