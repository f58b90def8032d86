"""The manifest of a run: one row an image, in SQLite.  Only the driver's main thread writes it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentdem.batch.inputs import Item
from latentdem.io import InputError

PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"
STATES = (PENDING, RUNNING, DONE, FAILED)

SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    id TEXT PRIMARY KEY,
    input TEXT NOT NULL,
    path TEXT NOT NULL,
    offset INTEGER,
    size INTEGER,
    stamp TEXT NOT NULL,
    kernel_size INTEGER,
    noise_std REAL,
    seed INTEGER,
    options TEXT NOT NULL,      -- digest of all but the image's content
    status TEXT NOT NULL,       -- pending, running (with a worker), done, failed
    reason TEXT,                -- of a failure
    attempts INTEGER NOT NULL,  -- times given to a worker, or found unreadable, for this request
    seconds REAL,               -- of the deblurring
    digest TEXT,                -- of the request, content included
    run INTEGER NOT NULL,       -- the last run that this image was an input of
    place INTEGER NOT NULL,     -- in that run's inputs
    added TEXT NOT NULL,
    started TEXT,
    finished TEXT
);
CREATE INDEX IF NOT EXISTS images_queue ON images (run, status, place);
CREATE INDEX IF NOT EXISTS images_status ON images (status);
"""

_ITEM = "id, input, path, offset, size, stamp, kernel_size, noise_std, seed"


def now() -> str:
    """Time of day in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Failure:
    """An image that failed, and why."""

    id: str
    input: str
    reason: str
    attempts: int


class Manifest:
    """States of images; survives a kill at any moment.

    Args:
        path: the file.
        readonly: to look at a run that is going on.

    Raises:
        InputError: not a manifest, or (``readonly``) there is none.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        if readonly and not path.is_file():
            raise InputError(f"{path}: no manifest; start with: latentdem batch INPUT -o FOLDER")
        self.path = path
        try:
            self._database = sqlite3.connect(path, timeout=30)
            if readonly:
                self._database.execute("PRAGMA query_only = on")
                self._database.execute("SELECT run, place FROM images LIMIT 1")
            else:
                self._database.execute("PRAGMA journal_mode = wal")
                # A kill of the process loses nothing; only a crash of the machine may lose the
                # last rows, and their results are found on disk.
                self._database.execute("PRAGMA synchronous = normal")
                self._database.executescript(SCHEMA)
            (last,) = self._database.execute("SELECT coalesce(max(run), 0) FROM images").fetchone()
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: not a manifest of latentdem batch ({error})") from None
        self.run = int(last) + (not readonly)

    def close(self) -> None:
        """Commit and close."""
        self._database.commit()
        self._database.close()

    def commit(self) -> None:
        """Make the changes so far last."""
        self._database.commit()

    def register(
        self,
        items: Iterable[Item],
        options: Callable[[Item], str],
        there: Callable[[str], bool],
        *,
        retry_failed: bool = False,
    ) -> int:
        """Enter the inputs of this run; what is done or has failed for the same request stays so.

        Args:
            items: the inputs.
            options: digest of what is asked of one.
            there: whether the output of an id is on disk.
            retry_failed: failed images become pending.

        Returns:
            How many there are.

        Raises:
            InputError: two inputs have the same id; nothing is entered then.
        """
        count, time = 0, now()
        try:
            for item in items:
                wanted = options(item)
                row = self._database.execute(
                    "SELECT run, input, stamp, options, status FROM images WHERE id = ?", (item.id,)
                ).fetchone()
                run, source, stamp, asked, status = row or (None, None, None, None, None)
                if run == self.run:
                    if source == item.input:
                        continue
                    raise InputError(
                        f"{source} and {item.input} would both be written to '{item.id}': rename "
                        "one, give ids in a manifest, or use two output folders"
                    )
                same = (stamp, asked) == (item.stamp, wanted)
                kept = same and (
                    (status == DONE and there(item.id)) or (status == FAILED and not retry_failed)
                )
                fields = {name: getattr(item, name) for name in _ITEM.split(", ")}
                self._database.execute(
                    f"INSERT INTO images ({_ITEM}, options, status, attempts, run, place, added)"
                    " VALUES (:id, :input, :path, :offset, :size, :stamp, :kernel_size,"
                    " :noise_std, :seed, :options, 'pending', 0, :run, :place, :time)"
                    " ON CONFLICT (id) DO UPDATE SET input = :input, path = :path,"
                    " offset = :offset, size = :size, stamp = :stamp, options = :options,"
                    " kernel_size = :kernel_size, noise_std = :noise_std, seed = :seed,"
                    " run = :run, place = :place,"
                    " attempts = CASE WHEN :same THEN attempts ELSE 0 END,"
                    " status = CASE WHEN :kept THEN status ELSE 'pending' END,"
                    " reason = CASE WHEN :kept THEN reason END,"
                    " seconds = CASE WHEN :kept THEN seconds END,"
                    " digest = CASE WHEN :kept THEN digest END,"
                    " finished = CASE WHEN :kept THEN finished END",
                    fields
                    | {
                        "options": wanted,
                        "run": self.run,
                        "place": count,
                        "time": time,
                        "same": same,
                        "kept": kept,
                    },
                )
                count += 1
        except BaseException:
            self._database.rollback()
            raise
        self._database.commit()
        return count

    def pending(self, window: int) -> Iterator[list[Item]]:
        """This run's pending images in order, ``window`` at a time."""
        place = -1
        while True:
            rows = self._database.execute(
                f"SELECT place, {_ITEM} FROM images WHERE run = ? AND status = 'pending'"
                " AND place > ? ORDER BY place LIMIT ?",
                (self.run, place, window),
            ).fetchall()
            if not rows:
                return
            place = rows[-1][0]
            yield [Item(*row[1:]) for row in rows]

    def mark_running(self, name: str, digest: str) -> None:
        """An image was given to a worker."""
        self._update(
            name, "status = 'running', attempts = attempts + 1, digest = ?, started = ?",
            digest, now(),
        )  # fmt: skip

    def mark_done(self, name: str, digest: str, seconds: float) -> None:
        """An image's output is complete on disk."""
        self._update(
            name, "status = 'done', digest = ?, seconds = ?, finished = ?", digest, seconds, now()
        )

    def mark_failed(self, name: str, reason: str, *, unread: bool = False) -> None:
        """An image cannot be restored; ``unread``: it was never given to a worker."""
        self._update(
            name, "status = 'failed', reason = ?, attempts = attempts + ?, finished = ?",
            reason, int(unread), now(),
        )  # fmt: skip

    def release(self) -> None:
        """No worker holds an image any more."""
        self._database.execute("UPDATE images SET status = 'pending' WHERE status = 'running'")

    def _update(self, name: str, change: str, *values: Any) -> None:
        self._database.execute(f"UPDATE images SET {change} WHERE id = ?", (*values, name))

    def counts(self, *, this_run: bool = False) -> dict[str, int]:
        """Images by state; ``this_run``: only this run's inputs."""
        where = "WHERE run = ?" if this_run else "WHERE ? IS NOT NULL"
        found = dict(
            self._database.execute(
                f"SELECT status, count(*) FROM images {where} GROUP BY status", (self.run,)
            )
        )
        return {state: found.get(state, 0) for state in STATES}

    def failures(self) -> Iterator[Failure]:
        """Images that failed, in the order of their ids."""
        for row in self._database.execute(
            "SELECT id, input, reason, attempts FROM images WHERE status = 'failed' ORDER BY id"
        ):
            yield Failure(*row)
