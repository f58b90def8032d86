"""Batches on Ray: a local cluster in a process of its own, of which one actor is killed."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNT = 7


def listening(process):
    """Addresses that descendants of ``process`` listen on, as /proc writes them."""
    parents, inodes = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(")")[2].split()[1]
            )
            for link in (entry / "fd").iterdir():
                target = os.readlink(link)  # noqa: PTH115
                if target.startswith("socket:"):
                    inodes.setdefault(target[8:-1], set()).add(int(entry.name))
        except OSError:
            continue

    def ours(number):
        while number > 1 and number != process:
            number = parents.get(number, 0)
        return number == process

    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and any(map(ours, inodes.get(words[9], ()))):
                found.add(words[1].partition(":")[0])
    return found


def scenario(folder):
    """Run in a process of its own: a batch on two actors, one is killed amid its second image."""
    from em.batch_stand_in import lines, make_folder, results, solve, wait_for

    from latentdem.batch import Options, run_batch

    photos, log = make_folder(folder / "photos", COUNT), folder / "log"
    options = Options(kernel_size=5)
    run_batch([photos], folder / "local", options, solve=solve, threads=1)
    facts = {}

    def kill():
        wait_for(lambda: sum(word == "end" for word, _, _ in lines(log)) >= 2)
        facts["addresses"] = sorted(listening(os.getpid()))
        while True:
            process = lines(log)[-1][2]
            # Stopped while it is looked at: what it had ended has arrived, and it is amid another.
            os.kill(int(process), signal.SIGSTOP)
            own = [(word, name) for word, name, number in lines(log) if number == process]
            arrived = {Path(path).parent.name for path in results(folder / "ray")}
            ended = {name for word, name in own if word == "end"}
            word, facts["held"] = own[-1]
            if word == "start" and ended and ended <= arrived:
                break
            os.kill(int(process), signal.SIGCONT)
            time.sleep(0.02)
        os.kill(int(process), signal.SIGKILL)
        facts["killed"] = int(process)

    killer = threading.Thread(target=kill)
    killer.start()
    stand_in = functools.partial(solve, log=str(log), seconds=0.6)
    summary = run_batch(
        [photos], folder / "ray", options, solve=stand_in, threads=1, workers=2, engine="ray"
    )
    killer.join()
    words = lines(log)
    facts |= {
        "done": summary.done,
        "failed": summary.failed,
        "started": [name for word, name, _ in words if word == "start"],
        "ended": [name for word, name, _ in words if word == "end"],
        "processes": len({process for _, _, process in words}),
        "same": {k: v for k, v in results(folder / "ray").items() if k.endswith(("png", "npy"))}
        == {k: v for k, v in results(folder / "local").items() if k.endswith(("png", "npy"))},
        "statistics": os.environ.get("RAY_USAGE_STATS_ENABLED"),
    }
    # Finished on Ray, it is finished for every engine.
    facts["again"] = run_batch([photos], folder / "ray", options, solve=stand_in).computed
    (folder / "facts.json").write_text(json.dumps(facts))


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="no Ray: pip install 'latentdem[ray]'"
)
def test_an_actor_is_killed(tmp_path):
    paths = [str(ROOT / "python"), str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, __file__, tmp_path],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["done"], facts["failed"], facts["again"]) == (COUNT, 0, 0)
    assert facts["same"]
    names = [str(number) for number in range(COUNT)]
    assert sorted(facts["started"]) == sorted([*names, facts["held"]])
    assert sorted(facts["ended"]) == names
    assert facts["processes"] == 3
    assert facts["statistics"] == "0"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert facts["addresses"] and set(facts["addresses"]) <= loopback


def test_without_ray(tmp_path, monkeypatch):
    from em.batch_stand_in import make_folder

    from latentdem.batch import run_batch
    from latentdem.io import InputError

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(InputError, match=r"pip install 'latentdem\[ray\]'"):
        run_batch([make_folder(tmp_path / "photos", 1)], tmp_path / "out", engine="ray")


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
