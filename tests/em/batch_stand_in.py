"""Stand-ins for the tests of ``latentdem batch``: a quick solver that keeps a log, and pictures.

As a script it is a process that has imported everything and runs commands in forks of itself,
which can be killed.  It reads requests as JSON, one a line, and prints the fork's process id, then
its exit status.  Every deblurring leaves lines in the file LATENTDEM_TEST_LOG.
"""

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

import torch

from latentdem.em import driver
from latentdem.em.driver import deblur
from latentdem.em.result import DeblurResult
from latentdem.io import to_pil


def note(log, *words):
    with open(log, "a") as stream:  # noqa: PTH123  # one write, whole beside other processes
        stream.write(" ".join(str(word) for word in words) + "\n")


def solve(image, *, seed, kernel_size, log=None, seconds=0.0, fatal="", progress, **_):
    """Not a deblurring: the image upside down, and a kernel that tells the seed."""
    name = picture_name(image)
    note(log, "start", name, os.getpid()) if log else None
    if name == fatal:
        raise RuntimeError("the stand-in fails with this one\nand says more")
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        time.sleep(0.02)
        progress()
    side = kernel_size or 5
    kernel = torch.ones(1, 1, side, side) + seed
    report = {"seconds": seconds, "seed": seed}
    note(log, "end", name, os.getpid()) if log else None
    return DeblurResult(image.flip(-2), kernel / kernel.sum(), image, [[]], report)


def picture(name, side=16, wide=16):
    """Noise whose first pixel is ``name``, a number."""
    noise = torch.rand(3, side, wide, generator=torch.Generator().manual_seed(int(name)))
    noise[:, 0, 0] = int(name) / 255
    return to_pil(noise)


def picture_name(image):
    return str(round(float(image[0, 0, 0, 0]) * 255))


def make_folder(folder, count=6, side=16):
    """``count`` pictures of two sizes, every third in a subfolder."""
    for number in range(count):
        path = folder / ("sub" if number % 3 == 0 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, side + 4 * (number % 2), side).save(path)
    return folder


def results(output):
    """Contents of all result files by name; reports without what differs from run to run."""
    found = {}
    for path in sorted(output.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(output).parts)
        if hidden or not path.is_file() or ".sqlite" in path.name or path.name == "failed.csv":
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            report = json.loads(content)
            for name in [
                name for name in report if name.startswith(("seconds", "peak_memory_bytes"))
            ]:
                del report[name]
            content = json.dumps(report)
        found[str(path.relative_to(output))] = content
    return found


def lines(log):
    """The log so far, in words; a line that is being written is left out."""
    text = Path(log).read_text() if Path(log).exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition, seconds=120.0):
    """Whether ``condition()`` came true in time."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def counted(image, **options):
    """deblur, with a line in the log before and after."""
    log = os.environ["LATENTDEM_TEST_LOG"]
    note(log, "start", picture_name(image))
    result = deblur(image, **options)
    note(log, "end", picture_name(image))
    return result


def main():
    driver.deblur = counted  # before latentdem.batch takes it
    from latentdem import cli
    from latentdem.batch import run  # noqa: F401  # imported once, for all forks

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what this process says is for the test alone
            os.environ.update(request.get("environment", {}))
            sys.argv = request["arguments"]
            code = 1
            try:
                if request.get("script"):
                    runpy.run_path(sys.argv[0], run_name="__main__")
                else:
                    cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        print(child, flush=True)
        if not request.get("wait", True):
            continue
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
