"""Batches that are killed: nothing that is finished is lost or repeated.

The commands run in forks of one process that has imported everything (``batch_stand_in.py``).
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from em import batch_stand_in
from em.batch_stand_in import lines, make_folder, results, wait_for
from PIL import Image
from typer.testing import CliRunner

from latentdem.cli import app

RUNNER = CliRunner()
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "python" / "examples" / "batch_torchrun.py"
COUNT = 6


class Commands:
    """Forks of a process that has imported latentdem."""

    def __init__(self, folder):
        self.log = folder / "log"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "LATENTDEM_TEST_LOG": str(self.log),
        }
        self.process = subprocess.Popen(
            [sys.executable, batch_stand_in.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **request):
        """Start a fork; its process id."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments):
        return self.ask(arguments=["latentdem", "batch", *map(str, arguments)])

    def ended(self):
        """The exit status of the last fork."""
        return int(self.process.stdout.readline())

    def started(self):
        """Images whose deblurring began, in order."""
        return [words[1] for words in lines(self.log) if words[0] == "start"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    found = Commands(tmp_path_factory.mktemp("commands"))
    yield found
    found.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("batch") / "photos", COUNT, side=96)


# Slow enough that a kill finds work going on, on a quick machine too.
# Random pictures look sharp, and would be done at once.
QUICK = ("--kernel-size", 5, "--steps", 8, "--assume-blurred")


@pytest.fixture(scope="module")
def uninterrupted(commands, photos):
    out = photos.parent / "whole"
    commands.start(photos, "-o", out, *QUICK, "--threads", 1)
    assert commands.ended() == 0
    assert sorted(commands.started()) == [str(n) for n in range(COUNT)]
    return results(out)


def complete(out):
    return {path.parent.name for path in out.rglob("report.json")}


def done(out):
    """What the manifest holds of images that are done."""
    database = sqlite3.connect(out / "manifest.sqlite")
    try:
        return set(
            database.execute("SELECT id, attempts, finished FROM images WHERE status = 'done'")
        )
    finally:
        database.close()


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again(commands, photos, uninterrupted, tmp_path, seed):
    draw = random.Random(seed)
    out = tmp_path / "out"
    begin, kills = len(commands.started()), []
    for _ in range(4):
        enough = len(commands.started()) + draw.choice([0, 1, 1, 2])
        process = commands.start(photos, "-o", out, *QUICK, "--threads", 1)
        assert wait_for(lambda: len(commands.started()) >= enough or not alive(process))  # noqa: B023
        time.sleep(draw.uniform(0, 0.4))
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(process, signal.SIGKILL)
        if commands.ended() == 0:
            break
        kills.append((complete(out), done(out), len(commands.started())))
    commands.start(photos, "-o", out, *QUICK, "--threads", 1)
    assert commands.ended() == 0
    assert results(out) == uninterrupted
    assert len(done(out)) == COUNT and len(kills) > 0
    for finished, known, now in kills:
        assert not finished & set(commands.started()[now:])
        assert known <= done(out)
    # Only what was being computed, or on its way to the disk, was begun again.
    assert len(commands.started()) - begin <= COUNT + 2 * len(kills)


def test_killed_within_a_batch(commands, photos, uninterrupted, tmp_path):
    """Images that are restored together are done one by one all the same."""
    out, now = tmp_path / "out", len(commands.started())
    arguments = (photos, "-o", out, *QUICK, "--threads", 1, "--batch-size", 3)
    process = commands.start(*arguments)
    assert wait_for(lambda: len(commands.started()) >= now + 2 or not alive(process))
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    assert commands.ended() == -signal.SIGKILL
    known = done(out)
    # Another batch size makes no other request.
    commands.start(*arguments[:-1], 2)
    assert commands.ended() == 0
    assert len(done(out)) == COUNT and known <= done(out)
    assert results(out).keys() == uninterrupted.keys()
    for path in out.rglob("restored.png"):
        name = str(path.relative_to(out))
        left, right = (
            np.asarray(Image.open(BytesIO(found[name]))).astype(float)
            for found in (results(out), uninterrupted)
        )
        # M-steps choose edges by thresholds, so that rounding does not stay rounding.
        assert np.sqrt(np.mean((left - right) ** 2)) < 2


def workers_of(process):
    """Process ids of a command's spawned workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if int(parent) == process and "spawn_main" in command:
                found.append(int(entry.name))
    return found


def test_killed_workers_and_a_killed_driver(commands, photos, uninterrupted, tmp_path):
    out = tmp_path / "out"
    arguments = (photos, "-o", out, *QUICK, "--threads", 1)
    driver = commands.start(*arguments, "--workers", 2)
    assert wait_for(lambda: len(complete(out)) >= 1)
    refused = subprocess.run(
        [sys.executable, "-c", "import fcntl, sys; fcntl.flock(open(sys.argv[1]), 6)",
         out / ".lock"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "BlockingIOError" in refused.stderr
    assert "a run is going on" in RUNNER.invoke(app, ["batch-status", str(out)]).output
    first, second = workers_of(driver)
    os.kill(first, signal.SIGKILL)
    # The other goes on, and another takes the dead one's place.
    assert wait_for(lambda: len(set(workers_of(driver)) - {first, second}) == 1)
    fresh = workers_of(driver)
    os.kill(driver, signal.SIGKILL)
    assert commands.ended() == -signal.SIGKILL
    known, finished, now = done(out), complete(out), len(commands.started())
    commands.start(*arguments)  # at once: the workers that are left hold no lock
    assert commands.ended() == 0
    assert results(out) == uninterrupted
    assert not finished & set(commands.started()[now:])
    assert known <= done(out)
    assert max(attempts for _, attempts, _ in done(out)) <= 3
    assert wait_for(lambda: not any(map(alive, [*fresh, second])))


def test_stopped_by_hand(commands, photos, tmp_path):
    out = tmp_path / "out"
    now = len(commands.started())
    process = commands.start(photos, "-o", out, *QUICK, "--threads", 1)
    assert wait_for(lambda: len(commands.started()) > now)
    os.kill(process, signal.SIGINT)
    assert commands.ended() == 130
    assert len(complete(out)) < COUNT
    assert not (out / ".partial").exists()
    status = RUNNER.invoke(app, ["batch-status", str(out)]).output
    assert status.split()[2:4] == ["running", "0"]
    assert "no run is going on: the same command again finishes it" in status


def test_the_torchrun_example(commands, photos, uninterrupted, tmp_path):
    out = tmp_path / "out"
    now = len(commands.started())
    for rank in range(2):  # two plain processes at once, as torchrun would start them
        commands.ask(
            script=True,
            arguments=[str(EXAMPLE), str(photos), "-o", str(out), *map(str, QUICK)],
            environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            wait=False,
        )
    assert wait_for(lambda: len(complete(out)) == COUNT)
    commands.ask(arguments=["latentdem", "batch-status", str(out)])
    assert commands.ended() == 0
    assert results(out) == uninterrupted
    assert sorted(commands.started()[now:]) == [str(n) for n in range(COUNT)]
    for rank in range(2):
        database = sqlite3.connect(out / f"manifest-{rank}.sqlite")
        assert database.execute("SELECT count(*) FROM images").fetchone() == (COUNT // 2,)
        database.close()
