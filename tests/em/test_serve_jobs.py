"""Work beside the page: one job at a time, cancelling, limits, and what the jobs do."""

import json
import threading
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from object_stand_in import exact_prior
from PIL import Image
from serve_stand_in import QUICK, counting, last

import latentdem
from latentdem.io import InputError, to_pil
from latentdem.priors import load_prior
from latentdem.serve import html, tasks
from latentdem.serve.jobs import Limits, Snapshot, Worker
from latentdem.serve.models import Models

# Jobs ---------------------------------------------------------------------------------------


def test_a_job_tells_its_updates_and_its_result(worker):
    gate = threading.Event()

    def work(job):
        job.report("half")
        gate.wait(5)
        return "whole"

    job = worker.submit(work, seconds=60)
    seen = []
    for now in job.watch(0.05):
        seen.append(now)
        if now.update == "half":
            gate.set()
    assert [now.update for now in seen if now.fresh] == ["half"]
    assert seen[-1].state == "done" and seen[-1].result == "whole" and seen[-1].final
    assert seen[-1].seconds > 0
    assert list(job.watch())[-1].result == "whole"  # whoever comes late


def test_fast_updates_are_thinned(worker):
    job = worker.submit(counting(60), seconds=60)
    began = time.monotonic()
    seen = list(job.watch(least=0.1))
    assert len(seen) <= (time.monotonic() - began) / 0.1 + 2
    assert seen[-1].state == "done" and seen[-1].update == 59


def test_one_job_at_a_time_in_order_and_no_more_than_may_wait(worker):
    log = []
    first = worker.submit(counting(20, log), seconds=60)
    time.sleep(0.02)
    second = worker.submit(lambda job: log.append("second"), seconds=60)
    waiting = next(second.watch())
    assert waiting.state == "waiting" and waiting.ahead == 1
    with pytest.raises(InputError, match=r"queue is full \(1 waiting\)"):
        worker.submit(counting(1), seconds=60)
    assert last(second).state == last(first).state == "done"
    assert log == [*range(20), "second"]
    assert last(worker.submit(lambda job: 1, seconds=60)).result == 1  # there is room again


def test_cancel_stops_the_work_itself(worker):
    log = []
    job = worker.submit(counting(4000, log), seconds=60)
    while len(log) < 3:
        time.sleep(0.002)
    job.cancel()
    assert last(job).state == "cancelled"
    count = len(log)
    time.sleep(0.05)
    assert len(log) == count < 4000


def test_cancel_in_the_queue(worker):
    first = worker.submit(counting(30), seconds=60)
    time.sleep(0.02)
    log = []
    second = worker.submit(counting(1, log), seconds=60)
    second.cancel()
    assert last(second).state == "cancelled"
    assert last(first).state == "done" and not log


def test_a_job_over_its_time_is_stopped_and_says_so(worker):
    job = worker.submit(counting(4000), seconds=0.05)
    end = last(job)
    assert end.state == "late" and end.result is None
    assert "longer than the 0.05 seconds" in html.ending(end, 0.05)


def test_time_in_the_queue_does_not_count(worker):
    first = worker.submit(counting(30), seconds=60)
    second = worker.submit(counting(2), seconds=0.1)
    assert last(first).seconds > 0.1 and last(second).state == "done"


def test_a_job_that_does_not_listen_is_said_to_be_stopping(worker):
    gate = threading.Event()

    def work(job):
        gate.wait(5)
        job.check()

    job = worker.submit(work, seconds=0.05)
    for now in job.watch(0.02):
        if now.stopping:
            gate.set()
    assert now.state == "late"


def test_errors_are_one_line(worker, capsys):
    def bad(job):
        raise InputError("kernel_size must be odd")

    assert last(worker.submit(bad, 60)) == Snapshot("failed", message="kernel_size must be odd",
                                                    seconds=pytest.approx(0, abs=5))  # fmt: skip
    assert not capsys.readouterr().err

    def broken(job):
        raise RuntimeError("no memory")

    end = last(worker.submit(broken, 60))
    assert end.message == "RuntimeError: no memory; the terminal says more"
    assert "Traceback" in capsys.readouterr().err
    assert last(worker.submit(lambda job: 2, 60)).result == 2  # the thread lives on


def test_closing_cancels_everything():
    worker = Worker(waiting=3)
    jobs = [worker.submit(counting(4000), seconds=60) for _ in range(3)]
    worker.close()
    assert {last(job).state for job in jobs} == {"cancelled"}
    with pytest.raises(InputError, match="stopping"):
        worker.submit(counting(1), seconds=1)


@pytest.mark.parametrize("name", ["megapixels", "megabytes", "seconds", "keep_minutes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, found 0"):
        Limits(**{name: 0})
    with pytest.raises(ValueError, match="waiting must be >= 0"):
        Limits(waiting=-1)


# What the jobs do ---------------------------------------------------------------------------


def test_jobs_compute_with_the_priors_of_the_server(worker, photo, tmp_path, monkeypatch):
    assert Models.load() == Models() and Models().described() == ""
    models = Models.load(dtype="bf16")
    assert models.photographs.dtype == models.objects.dtype == torch.bfloat16
    assert models.packaged_objects
    first, second = models.described().split("; ")
    assert first == f"photographs: {load_prior().name}, on cpu in bfloat16"
    assert second.startswith("objects: ") and second.endswith(" in bfloat16")
    with pytest.raises(FileNotFoundError):
        Models.load("no/such/prior.safetensors")
    asked = []
    monkeypatch.setattr(latentdem, "deblur", lambda *_, **options: asked.append(options))
    monkeypatch.setattr(latentdem, "reconstruct", lambda *_, **options: asked.append(options))
    other = tmp_path / "other.png"
    Image.new("RGB", (20, 20)).save(other)
    for task, request in (
        (tasks.deblur, tasks.DeblurRequest(photo)),
        (tasks.reconstruct, tasks.ObjectsRequest([photo, other])),
    ):
        for given in (models, None):
            last(worker.submit(task(request, tmp_path, Limits(), given), seconds=60))
    assert [options.get("prior") for options in asked] == [
        models.photographs, None, models.objects, None,
    ]  # fmt: skip


def test_deblur_streams_steps_and_leaves_files(worker, photo, tmp_path):
    folder = tmp_path / "results"
    request = tasks.DeblurRequest(photo, side=32, kernel_size=5, noise_std=0.02, steps=2, seed=1)
    job = worker.submit(tasks.deblur(request, folder, Limits()), seconds=60)
    seen = list(job.watch(0.05))
    frame = seen[-1].update
    assert frame.steps == 2 and frame.image.size == (27, 32) and frame.kernel.size == (255, 255)
    assert ("Kernel", "5 x 5 pixels") in frame.facts
    answer = seen[-1].result
    same = latentdem.deblur(
        tasks._shrink(torch.from_numpy(pixels(photo)), 32),
        kernel_size=5, noise_std=0.02, steps=2, seed=1,
    )  # fmt: skip
    with Image.open(answer.after) as after:
        assert after.tobytes() == to_pil(same.image[0]).tobytes()
    report = json.loads((folder / "report.json").read_text())
    assert report["input"] == "photo.png" and report["longer_side"] == 32
    with zipfile.ZipFile(answer.files[-1]) as archive:
        assert set(archive.namelist()) == {file.name for file in answer.files[:-1]}
        assert {"restored.png", "kernel.png", "kernel.npy", "report.json"} <= {*archive.namelist()}
    facts = dict(answer.facts)
    assert facts["Picture"] == "27 x 32 pixels" and facts["Noise"] == "2.0 % of white, given"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255


def test_cancelled_deblurring_stops_at_the_step_and_leaves_nothing(worker, photo, tmp_path):
    folder = tmp_path / "results"
    request = tasks.DeblurRequest(photo, kernel_size=5, steps=400)
    job = worker.submit(tasks.deblur(request, folder, Limits()), seconds=60)
    steps = []
    for now in job.watch(0.05):
        if now.fresh:
            steps.append(now.update.step)
            job.cancel()
    assert now.state == "cancelled" and max(steps) < 100
    assert not folder.exists()


def test_deblurring_over_the_time_limit(worker, photo, tmp_path):
    request = tasks.DeblurRequest(photo, kernel_size=5, steps=400)
    job = worker.submit(tasks.deblur(request, tmp_path / "results", Limits()), seconds=0.1)
    assert last(job).state == "late"


def test_advice_heeds_the_kernel():
    line = torch.zeros(9, 9)
    line[4] = 1 / 9
    assert tasks.blur_extent(line) == (9, 1)
    assert "reaches its frame" in tasks.deblur_advice(line, 0.002)[0]
    assert "13" in tasks.deblur_advice(line, 0.002)[0]
    dot = torch.zeros(9, 9)
    dot[4, 4] = 1
    assert "nearly a dot" in tasks.deblur_advice(dot, 0.002)[0]
    short = torch.zeros(9, 9)
    short[4, 3:6] = 1 / 3
    assert len(tasks.deblur_advice(short, 0.02)) == 1
    assert "a noise of 0.04" in tasks.deblur_advice(short, 0.02)[0]


def test_reconstruct_leaves_files(worker, tmp_path, monkeypatch):
    prior, views = exact_prior()
    paths = []
    for k, view in enumerate(views[:2]):
        paths.append(tmp_path / f"view{k}.png")
        to_pil(view).save(paths[-1])
    quick = partial(latentdem.reconstruct, prior=prior, settings=QUICK)
    monkeypatch.setattr(latentdem, "reconstruct", quick)
    folder = tmp_path / "results"
    work = tasks.reconstruct(tasks.ObjectsRequest(paths, elevation=20.0), folder, Limits())
    seen = list(worker.submit(work, seconds=60).watch(0.05))
    assert seen[-1].state == "done", seen[-1].message
    answer = seen[-1].result
    assert [row[0] for row in answer.poses] == ["view0.png", "view1.png"]
    assert answer.poses[0][1] == "20°" and answer.poses[0][2].startswith("0°")
    assert all(file.is_file() for file in (answer.sheet, answer.turntable, *answer.files))
    assert seen[-1].update.phase == "mesh" and seen[-1].update.share == 1.0

    def slow(*args, progress, **options):
        for k in range(4000):
            progress("poses", k / 4000)
            time.sleep(0.005)

    monkeypatch.setattr(latentdem, "reconstruct", slow)
    job = worker.submit(tasks.reconstruct(tasks.ObjectsRequest(paths), folder, Limits()), 60)
    for now in job.watch(0.05):
        if now.fresh:
            job.cancel()
    assert now.state == "cancelled"


def test_too_few_or_many_views(tmp_path, photo):
    for count, line in ((0, "two or more"), (1, "found 1; add one"), (9, "at most 8")):
        with pytest.raises(InputError, match=line):
            tasks.reconstruct(tasks.ObjectsRequest([photo] * count), tmp_path, Limits())
