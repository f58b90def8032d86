"""What several test files of this folder share."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from em.device_stand_in import stand_in_device

from latentdem.io import to_pil
from latentdem.serve.jobs import Worker


@pytest.fixture(autouse=True)
def nothing_is_sharp(request, monkeypatch):
    """Random pictures look sharp; but for the tests of just that, they are deblurred."""
    if request.module.__name__.rpartition(".")[2] != "test_sharpness":
        monkeypatch.setattr("latentdem.em.sharp.SHARP_LOG_ODDS", float("inf"))


@pytest.fixture
def device(monkeypatch):
    """A stand-in for a second device, which the check of devices lets pass."""
    monkeypatch.setattr("latentdem.em.options.check_device", torch.device)
    with stand_in_device() as device:
        yield device


@pytest.fixture
def worker():
    made = Worker(waiting=1)
    yield made
    made.close()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    to_pil(torch.rand(3, 48, 40)).save(path)
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The page of ``latentdem serve`` with stand-ins; must end quietly and leave nothing."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('needs Gradio: pip install "latentdem[serve]"')
    folder = tmp_path_factory.mktemp("serve")
    script = Path(__file__).with_name("serve_stand_in.py")
    tests = script.parent
    paths = os.pathsep.join([str(tests), *(path for path in sys.path if path)])
    environment = os.environ | {
        "TMPDIR": str(folder),
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    log, errors = folder / "steps.log", folder / "stderr"
    with (
        errors.open("w") as stream,
        subprocess.Popen(
            [sys.executable, str(script), str(log)],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=environment,
        ) as process,
    ):
        line = process.stdout.readline()
        assert line, errors.read_text()
        told = json.loads(line)

        def idle(seconds=20):
            """Whether the stand-in stops counting."""
            end = time.monotonic() + seconds
            before = None
            while time.monotonic() < end:
                now = log.read_text()
                if now == before:
                    return True
                before = now
                time.sleep(0.3)
            return False

        yield SimpleNamespace(url=told["url"], root=Path(told["root"]), idle=idle)
        process.terminate()
        process.wait(30)
    assert process.returncode == 0
    assert not Path(told["root"]).exists()
    assert "Traceback" not in errors.read_text(), errors.read_text()
