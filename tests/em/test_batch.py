"""A batch from inputs to results and manifest, with a quick stand-in for the deblurring."""

import csv
import errno
import functools
import json
import os
import sqlite3
import tarfile
from concurrent.futures import Future
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from em.batch_stand_in import lines, make_folder, picture, results, solve
from rich.console import Console
from typer.testing import CliRunner

import latentdem
from latentdem import cli_batch
from latentdem.batch import Options, WorkerLost, run_batch
from latentdem.batch import run as driver
from latentdem.batch.engines import LocalEngine, Pool, Seat
from latentdem.batch.output import locked
from latentdem.batch.worker import Setup
from latentdem.cli import app
from latentdem.em import together
from latentdem.io import InputError, atomic_folder, open_image

RUNNER = CliRunner()
QUICK = Options(kernel_size=5, steps=1)


@pytest.fixture
def photos(tmp_path):
    return make_folder(tmp_path / "photos")


@pytest.fixture
def go(photos, tmp_path):
    """Run a batch with the stand-in; says which images were computed."""
    log = tmp_path / "log"

    def run(*inputs, out="out", options=QUICK, fatal="", **others):
        log.unlink(missing_ok=True)
        stand_in = functools.partial(solve, log=str(log), fatal=fatal)
        summary = run_batch(
            inputs or [photos], tmp_path / out, options, solve=stand_in, threads=1, **others
        )
        run.summary = summary
        return [name for word, name, _ in lines(log) if word == "start"]

    return run


def rows(path, columns="id, status, reason, attempts"):
    database = sqlite3.connect(path)
    try:
        return database.execute(f"SELECT {columns} FROM images ORDER BY id").fetchall()
    finally:
        database.close()


def change(path, statement):
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()


def test_same_as_deblur_whatever_the_grouping(tmp_path):
    photos = make_folder(tmp_path / "photos", count=4, side=40)
    kwargs = {"options": QUICK, "threads": torch.get_num_threads()}
    grouped = run_batch([photos], tmp_path / "grouped", **kwargs)
    plain = run_batch([photos], tmp_path / "plain", group=False, **kwargs)
    assert (grouped.done, grouped.failed, plain.done) == (4, 0, 4)
    assert results(tmp_path / "grouped") == results(tmp_path / "plain")
    for path in sorted(photos.rglob("*.png")):
        latentdem.deblur(path, kernel_size=5, steps=1).save(tmp_path / "alone")
        place = tmp_path / "grouped" / path.relative_to(photos).with_suffix("")
        for name in ("restored.png", "kernel.png", "kernel.npy", "comparison.png"):
            assert (place / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        report = json.loads((place / "report.json").read_text())
        assert report["input"] == str(path)
        assert report["request"]["seed"] == 0 and report["kernel_size"] == 5


def test_neighbours_have_the_same_size(go, photos, tmp_path, monkeypatch):
    order = []

    class Watched(LocalEngine):
        def submit(self, task):
            order.append(task.id)
            return super().submit(task)

    monkeypatch.setattr(driver, "make_engine", lambda *a: Watched(Setup(threads=1, **a[4])))
    assert sorted(go()) == list("012345")
    assert go.summary.computed == go.summary.done == 6
    assert order == ["2", "4", "sub/0", "1", "5", "sub/3"]
    order.clear()
    go(out="other", group=False)
    assert order == ["1", "2", "4", "5", "sub/0", "sub/3"]
    order.clear()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in (3, 0, 5, 2):
            archive.add(next(photos.rglob(f"{name}.png")), f"{name}.png")
    go(tmp_path / "shard.tar", out="shard")
    assert order == ["shard/3", "shard/0", "shard/5", "shard/2"]


def test_what_is_done_stays_done(go, photos, tmp_path):
    out = tmp_path / "out"
    assert len(go()) == 6
    before = results(out)
    assert go() == [] and go.summary.before == 6
    (photos / "2.png").touch()
    assert go() == []  # the same content
    picture(2, 18, 18).save(photos / "2.png")
    assert go() == ["2"]
    (out / "1" / "report.json").unlink()
    assert go() == ["1"]
    (out / "1" / "kernel.npy").unlink()
    (photos / "1.png").touch()
    assert go() == ["1"]
    assert sorted(go(options=Options(kernel_size=5, steps=1, seed=1))) == list("012345")
    assert go(options=Options(kernel_size=5, steps=1, seed=1)) == []
    assert len(go()) == 6
    after = results(out)
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} <= {n for n in after if n.startswith("2/")}
    assert {p.name for p in out.iterdir()} == {
        "1", "2", "4", "5", "sub", "manifest.sqlite", ".lock",
    }  # fmt: skip


def test_complete_on_disk_but_not_in_the_manifest(go, tmp_path):
    go()
    manifest = tmp_path / "out" / "manifest.sqlite"
    before = rows(manifest, "id, status, digest")
    change(manifest, "UPDATE images SET status = 'running', digest = NULL, seconds = NULL")
    (tmp_path / "out" / ".partial" / ".partial-x").mkdir(parents=True)
    assert go() == []
    assert rows(manifest, "id, status, digest") == before
    assert not (tmp_path / "out" / ".partial").exists()
    for path in (tmp_path / "out").glob("manifest*"):
        path.unlink()
    assert go() == [] and go.summary.done == 6


def test_failures_are_kept_apart(go, photos, tmp_path):
    (photos / "bad.png").write_text("no image")
    (photos / "cut.png").write_bytes((photos / "1.png").read_bytes()[:200])
    manifest = tmp_path / "out" / "manifest.sqlite"
    assert len(go(fatal="4")) == 6
    assert (go.summary.done, go.summary.failed) == (5, 3)
    found = {name: (status, reason, n) for name, status, reason, n in rows(manifest)}
    assert found["4"] == ("failed", "RuntimeError: the stand-in fails with this one", 1)
    assert found["bad"][0] == found["cut"][0] == "failed"
    assert found["1"] == ("done", None, 1)
    with (tmp_path / "out" / "failed.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    assert [row["id"] for row in listed] == ["4", "bad", "cut"]
    assert "not an image" in listed[1]["reason"] and "truncated" in listed[2]["reason"]
    assert go() == [] and go.summary.failed == 3  # not tried again by itself
    picture(7).save(photos / "bad.png")
    assert go() == ["7"]  # another file is another request
    assert go(retry_failed=True) == ["4"] and go.summary.failed == 1
    found = {name: (status, reason, n) for name, status, reason, n in rows(manifest)}
    assert found["4"] == ("done", None, 2)
    (photos / "cut.png").unlink()
    assert go(retry_failed=True) == []


def test_missing_file_of_a_manifest(go, tmp_path, photos):
    (tmp_path / "list.csv").write_text("path\nphotos/1.png\nphotos/later.png\n")
    assert go(tmp_path / "list.csv") == ["1"] and go.summary.failed == 1
    assert rows(tmp_path / "out" / "manifest.sqlite")[1][2:] == (
        f"{tmp_path}/photos/later.png: no such file", 1,
    )  # fmt: skip
    picture(9).save(photos / "later.png")
    assert go(tmp_path / "list.csv") == ["9"] and go.summary.failed == 0


def test_rows_override_options(go, tmp_path):
    (tmp_path / "list.csv").write_text(
        "path,kernel_size,seed,noise_std,id\nphotos/1.png,7,3,,a\nphotos/1.png,,,0.05,b\n"
    )
    assert go(tmp_path / "list.csv") == ["1", "1"]
    reports = [json.loads((tmp_path / "out" / i / "report.json").read_text()) for i in "ab"]
    requests = [report["request"] for report in reports]
    assert [(r["kernel_size"], r["seed"], r["noise_std"]) for r in requests] == [
        (7, 3, None), (5, 0, 0.05),
    ]  # fmt: skip
    assert np.load(tmp_path / "out" / "a" / "kernel.npy").shape == (7, 7)


def test_shards_give_what_their_files_give(go, photos, tmp_path):
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos, ".")
    found = go(path)
    assert sorted(found) == list("012345")
    assert go(path) == []
    go(out="files")
    shard = {k.removeprefix("photos/"): v for k, v in results(tmp_path / "out").items()}
    files = results(tmp_path / "files")
    assert shard.keys() == files.keys()
    assert all(shard[k] == files[k] for k in files if not k.endswith(".json"))


def test_flat_layout(go, tmp_path):
    go(layout="flat")
    go(out="folders")
    flat, folders = tmp_path / "out", tmp_path / "folders"
    assert results(flat).keys() == {f"{i}.{e}" for i in ("1", "2", "4", "5", "sub/0", "sub/3")
                     for e in ("png", "json")}  # fmt: skip
    assert (flat / "sub/0.png").read_bytes() == (folders / "sub/0/restored.png").read_bytes()
    kernel = np.array(json.loads((flat / "1.json").read_text())["kernel"], dtype=np.float32)
    assert np.array_equal(kernel, np.load(folders / "1" / "kernel.npy"))
    assert go(layout="flat") == []
    (flat / "1.json").unlink()
    assert go(layout="flat") == ["1"]


def test_tiles_of_a_large_photograph_are_kept(tmp_path, monkeypatch):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    picture(1, 100, 100).save(photos / "large.png")
    options = Options(kernel_size=5, steps=1, tile=64)
    calls, real = [], together.run_prox

    def run_prox(*arguments, **others):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(*arguments, **others)

    monkeypatch.setattr(together, "run_prox", run_prox)
    assert run_batch([photos], out, options, threads=1).failed == 1
    assert rows(out / "manifest.sqlite")[0][2] == "MemoryError: no room"
    assert len(list(out.glob(".tiles/*/000/*.safetensors"))) == 2
    calls.extend([1] * 9)
    assert run_batch([photos], out, options, threads=1, retry_failed=True).done == 1
    assert not (out / ".tiles").exists()
    again = len(calls) - 12
    run_batch([photos], tmp_path / "whole", options, threads=1)
    assert len(calls) - 12 - again == again + 2
    names = [name for name in results(out) if not name.endswith("json")]
    assert [results(out)[n] for n in names] == [results(tmp_path / "whole")[n] for n in names]


def test_two_inputs_of_one_name(go, photos, tmp_path):
    picture(1).convert("L").save(photos / "1.jpg")
    with pytest.raises(InputError, match=r"1\.jpg and .*1\.png would both be written to '1'"):
        go()
    assert rows(tmp_path / "out" / "manifest.sqlite") == []
    (photos / "1.jpg").unlink()
    assert len(go(photos, photos / "1.png")) == 6  # one image given twice is one image


def test_two_runs_on_one_output(go, tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
            go()
        with pytest.raises(InputError, match="in use by"):
            go(share=(0, 2))
    with locked(tmp_path / "out", "-0"):
        with pytest.raises(InputError, match="in use by runs with --share"):
            go()
        with pytest.raises(InputError, match="in use by process"):
            go(share=(0, 2))
        assert len(go(share=(1, 2))) == 3


def test_shares_make_the_whole(go, tmp_path):
    found = [go(share=(r, 4)) for r in range(4)]
    assert sorted(name for part in found for name in part) == list("012345")
    go(out="whole")
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    text = RUNNER.invoke(app, ["batch-status", str(tmp_path / "out")]).output
    assert text.split()[:8] == ["pending", "0", "running", "0", "done", "6", "failed", "0"]
    with pytest.raises(InputError, match="share must be r of R"):
        go(share=(4, 4))


def test_an_output_that_is_in_the_way(go, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1").write_text("a file of the user's")
    go()
    assert (go.summary.done, go.summary.failed) == (5, 1)
    assert "in the way" in rows(tmp_path / "out" / "manifest.sqlite")[0][2]
    assert (tmp_path / "out" / "1").read_text() == "a file of the user's"


def test_a_full_disk_ends_the_run(go, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(driver.Output, "write", full)
        with pytest.raises(InputError, match="No space left on device; what is finished is kept"):
            go()
    assert {status for _, status, _, _ in rows(tmp_path / "out" / "manifest.sqlite")} <= {
        "pending", "running",
    }  # fmt: skip
    assert len(go()) == 6


class Fragile(LocalEngine):
    """Loses its worker with certain images, so many times."""

    def __init__(self, setup, deaths):
        super().__init__(setup)
        self.deaths = deaths

    def submit(self, task):
        if self.deaths.get(task.id, 0) > 0:
            self.deaths[task.id] -= 1
            future = Future()
            future.set_exception(WorkerLost("process 7 ended with code -9"))
            return future
        return super().submit(task)


def test_lost_workers(go, tmp_path, monkeypatch):
    deaths = {"1": 2, "sub/3": 99}

    def make(name, workers, device, threads, setup, address):
        return Fragile(Setup(threads=threads, **setup), deaths)

    monkeypatch.setattr(driver, "make_engine", make)
    assert sorted(go()) == list("01245")
    found = {name: (status, reason, n) for name, status, reason, n in rows(
        tmp_path / "out" / "manifest.sqlite")}  # fmt: skip
    assert found["1"] == ("done", None, 3)
    assert found["sub/3"][0] == "failed" and found["sub/3"][2] == 3
    assert found["sub/3"][1].startswith("3 workers died with it, last: process 7")


class Counting(Pool):
    """A pool without workers."""

    def __init__(self):
        super().__init__([Setup(), Setup()])
        self.started, self.sent = [], []
        self._start_all()

    def _start(self, seat):
        self.started.append(seat.index)

    def _wait(self, seat):
        assert isinstance(seat, Seat)

    def _send(self, seat, task, future):
        self.sent.append((seat, future))


def test_a_pool_spreads_tasks_and_replaces_the_dead():
    pool = Counting()
    assert pool.slots == 4 and pool.started == [0, 1]
    futures = [pool.submit(None) for _ in range(4)]
    assert [seat.index for seat, _ in pool.sent] == [0, 1, 0, 1]
    pool._answered(*pool.sent[1], "answer")
    assert futures[1].result() == "answer"
    pool.submit(None)
    assert pool.sent[-1][0].index == 1
    pool._answered(*pool.sent[0], WorkerLost("gone"))
    with pytest.raises(WorkerLost):
        futures[0].result()
    pool.submit(None)
    assert pool.started == [0, 1, 0] and pool.sent[-1][0].index == 0
    assert pool.sent[-1][0] is not pool.sent[0][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "magic"}, "engine must be one of auto, local, processes, ray, found 'magic'"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"engine": "local", "workers": 2}, "the local engine is one worker, found 2"),
        ({"address": "auto"}, "--address belongs to --engine ray"),
        ({"layout": "nested"}, "layout must be folders or flat"),
        ({"engine": "ray", "device": "cuda:1"}, "--device cuda"),
        ({"device": "cpu,cuda:1"}, "all workers must be on cpu or all on cuda"),
    ],
)
def test_options_that_do_not_go_together(photos, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run_batch([photos], tmp_path / "out", QUICK, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"kernel_size": 8}, "kernel_size must be odd"),
        ({"steps": 0}, "steps must be positive"),
        ({"noise_std": 1.0}, "noise_std must lie between"),
        ({"tile": 8}, "tile must be at least 64"),
        ({"seed": 2**64}, "seed must fit in 64 bits"),
    ],
)
def test_options_are_checked_before_anything_else(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_command_line(tmp_path):
    photos, out = make_folder(tmp_path / "photos", count=2, side=32), tmp_path / "out"
    (photos / "bad.png").write_text("no image")
    arguments = ["batch", str(photos), "-o", str(out), "--kernel-size", "5", "--steps", "1"]
    arguments += ["--threads", "1", "--log-every", "1"]
    first = RUNNER.invoke(app, arguments)
    assert first.exit_code == 1
    assert "bad.png: failed: not an image" in first.output
    assert "3 images: 2 done (0 of them before), 1 failed" in first.output
    assert "3/3" in first.output and "images/" in first.output and "left" in first.output
    assert f"{out}/failed.csv" in first.output and "batch-status" in first.output
    assert open_image(out / "1" / "restored.png").size == (32, 36)
    picture(9, 32, 32).save(photos / "bad.png")
    second = RUNNER.invoke(app, [*arguments, "--retry-failed"])
    assert second.exit_code == 0, second.output
    assert "3 images: 3 done (2 of them before), 0 failed" in second.output
    assert not (out / "failed.csv").exists()
    (photos / "bad.png").write_text("no image")
    RUNNER.invoke(app, arguments)
    status = RUNNER.invoke(app, ["batch-status", str(out)])
    assert status.exit_code == 0
    assert status.output.split()[:8] == ["pending", "0", "running", "0", "done", "2", "failed", "1"]
    assert "bad: " in status.output and "--retry-failed" in status.output
    short = RUNNER.invoke(app, ["batch-status", str(out), "--failures", "0"])
    assert "1 more: --failures 1" in short.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: no such file or folder"),
        (["{photos}", "--share", "2"], "--share must look like 0/4"),
        (["{photos}", "--device", "cpu,magic"], "device 'magic' cannot be used"),
        (["{photos}", "--prior", "none.safetensors"], "none.safetensors"),
        (["{photos}", "--method", "magic"], "method must be one of"),
    ],
)
def test_command_line_errors_are_one_line(photos, tmp_path, arguments, message):
    filled = [a.format(photos=photos) for a in arguments]
    result = RUNNER.invoke(app, ["batch", *filled, "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.output and result.output.count("\n") == 1


def test_a_bar_in_a_terminal(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "bad.png").write_text("no image")
    screen = StringIO()
    monkeypatch.setattr(
        cli_batch,
        "console",
        Console(file=screen, force_terminal=True, width=150, color_system=None),
    )
    assert RUNNER.invoke(app, ["batch", str(photos), "-o", str(tmp_path / "out")]).exit_code == 1
    shown = screen.getvalue()
    assert "bad.png: failed: not an image" in shown
    assert "deblurring, 1 failed" in shown and "1/1" in shown and "0 s left" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (75, "1 min 15 s"), (7260, "2 h 1 min"), (float("inf"), "?")],
)
def test_durations(seconds, text):
    assert cli_batch._duration(seconds) == text


def test_status_without_a_batch(tmp_path):
    result = RUNNER.invoke(app, ["batch-status", str(tmp_path)])
    assert result.exit_code == 1 and "no manifest; start with" in result.output
    (tmp_path / "manifest.sqlite").write_text("not a database, and long enough to be read as one")
    result = RUNNER.invoke(app, ["batch-status", str(tmp_path)])
    assert result.exit_code == 1 and "not a manifest" in result.output


def test_a_folder_is_never_a_mixture(tmp_path, monkeypatch):
    """Killed between two moves, a folder has no report, neither the old nor the new one."""
    names = ("restored.png", "report.json", "kernel.png")

    def write(content):
        with atomic_folder(tmp_path / "result", scratch=tmp_path) as partial:
            for name in names:
                (partial / name).write_text(content)

    write("old")
    moved, replace = [], Path.replace

    def killed(path, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target.name)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        write("new")
    assert moved == ["kernel.png"]
    found = {p.name: p.read_text() for p in (tmp_path / "result").iterdir()}
    assert found == {"kernel.png": "new", "restored.png": "old"}
    write("new")
    assert {p.name: p.read_text() for p in (tmp_path / "result").iterdir()} == dict.fromkeys(
        names, "new"
    )
