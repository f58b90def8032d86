"""The output folder: results, and locks that die with their process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from latentdem.batch.worker import FLAT, FOLDERS, file_names
from latentdem.io import InputError, atomic_folder


class Output:
    """Where results go.

    Args:
        folder: the output.
        layout: ``folders``: a folder an image; ``flat``: a picture and a report.
        share: of a run that shares the output with others: their hidden folders are apart.
    """

    def __init__(self, folder: Path, layout: str, share: str = "") -> None:
        if layout not in (FOLDERS, FLAT):
            raise InputError(f"layout must be {FOLDERS} or {FLAT}, found '{layout}'")
        self.folder, self.layout = folder, layout
        self.scratch = folder / f".partial{share}"
        self.tiles = folder / f".tiles{share}"

    def clear(self) -> None:
        """Remove what a killed run left half written; finished tiles stay."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def tidy(self) -> None:
        """Remove the hidden folders; tiles of photographs that are not finished stay."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.tiles.is_dir() and not any(self.tiles.iterdir()):
            self.tiles.rmdir()

    def place(self, name: str) -> Path:
        """The folder that an image's files lie in."""
        return self.folder / name if self.layout == FOLDERS else (self.folder / name).parent

    def report(self, name: str) -> Path:
        """The file that says that an image is complete."""
        return self.place(name) / file_names(name, self.layout)[-1]

    def seconds(self, name: str, digest: str) -> float | None:
        """How long a result took that is complete and was asked for by ``digest``; else nothing."""
        try:
            report = json.loads(self.report(name).read_text())
            if report["request_digest"] != digest:
                return None
            names = file_names(name, self.layout)
            whole = all((self.place(name) / file).is_file() for file in names)
            return float(report["seconds"]) if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def checkpoint(self, digest: str) -> Path:
        """Folder of a large photograph's finished tiles."""
        return self.tiles / digest

    def write(self, name: str, digest: str, files: dict[str, bytes]) -> None:
        """Write an image's files; whole or not at all."""
        last = file_names(name, self.layout)[-1]
        with atomic_folder(self.place(name), last=last, scratch=self.scratch) as partial:
            for file, content in files.items():
                (partial / file).write_bytes(content)
        self.forget(digest)

    def forget(self, digest: str) -> None:
        """Remove the tiles of a photograph that is finished."""
        shutil.rmtree(self.checkpoint(digest), ignore_errors=True)


@contextmanager
def locked(folder: Path, share: str = "") -> Iterator[None]:
    """Hold ``folder`` against other runs; the lock goes with the process, however it ends.

    Runs of different shares may hold it together, a run without one holds it alone.

    Raises:
        InputError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [(".lock", fcntl.LOCK_SH if share else fcntl.LOCK_EX)]
    names += [(f".lock{share}", fcntl.LOCK_EX)] if share else []
    with ExitStack() as stack:
        for name, kind in names:
            # Not inheritable, as all of Python's files: workers that outlive us hold no lock.
            stream = stack.enter_context((folder / name).open("a+"))
            try:
                fcntl.flock(stream, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise InputError(
                    f"{folder} is in use by {holder}: wait for it, stop it, or choose another "
                    "output"
                ) from None
            stream.truncate(0)
            one = f"process {os.getpid()} on {os.uname().nodename}"
            stream.write("runs with --share" if kind == fcntl.LOCK_SH else one)
            stream.flush()
        yield


def in_use(folder: Path) -> bool:
    """Whether a run holds ``folder`` now."""
    try:
        with (folder / ".lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
