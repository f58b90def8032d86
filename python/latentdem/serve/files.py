"""The server's private folder, and what is allowed into it."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from latentdem.io import InputError
from latentdem.serve.jobs import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
"""That are read: those that Pillow decodes by itself (for EPS, say, it would start a program)."""

MEGABYTE = 2**20
"""Bytes, as Gradio counts them."""


def check_picture(path: Path, limits: Limits) -> tuple[int, int]:
    """Width and height of a picture, from its header alone.

    Raises:
        InputError: no picture, or one above the limits; a line that names the file.
    """
    name = path.name
    try:
        size = path.stat().st_size
        if size > limits.megabytes * MEGABYTE:
            raise InputError(
                f"{name}: {size / MEGABYTE:.1f} MB, more than the {limits.megabytes:g} MB that "
                "this server takes"
            )
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except FileNotFoundError:
        raise InputError(f"{name}: no longer there; choose the picture again") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"{name}: more than the {limits.megapixels:g} megapixels that this server takes; "
            "shrink it first"
        ) from None
    except InputError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise InputError(
            f"{name}: not a picture; choose a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        ) from None
    if width * height > limits.megapixels * 1e6:
        raise InputError(
            f"{name}: {width} x {height} = {width * height / 1e6:.1f} megapixels, more than the "
            f"{limits.megapixels:g} that this server takes; shrink it first"
        )
    return width, height


def open_picture(path: Path, limits: Limits) -> Image.Image:
    """The picture, checked and upright.

    Raises:
        InputError: as in :func:`check_picture`, or it is damaged.
    """
    check_picture(path, limits)
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path.name}: damaged or truncated picture ({error})") from None


def zip_files(target: Path, files: Iterable[Path]) -> Path:
    """Write ``files``, which are compressed already, to the archive ``target``; returns it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
    return target


class Store:
    """Uploads and results, in one folder that is pruned by age.

    Args:
        root: the folder, private to this server; whoever made it removes it.
        minutes: age at which a file is deleted.
    """

    def __init__(self, root: Path, minutes: float) -> None:
        self.root, self.minutes = root.resolve(), minutes
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="latentdem-prune", daemon=True)
        self._thread.start()

    def new_folder(self) -> Path:
        """An empty folder with a name that nobody can guess."""
        folder = self.root / "results" / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        return folder

    def borrow(self, path: Path) -> Path:
        """A copy of ``path`` within the folder."""
        return Path(shutil.copy(path, self.new_folder() / path.name))

    def draw(self, name: str, picture: Image.Image) -> Path:
        """``picture`` as a file called ``name`` within the folder."""
        target = self.new_folder() / name
        picture.save(target)
        return target

    def holds(self, path: str | Path) -> bool:
        """Whether ``path``, links followed, is a file within the folder."""
        try:
            real = Path(path).resolve()
            return real.is_relative_to(self.root) and real.is_file()
        except (OSError, ValueError):  # too long, a null byte
            return False

    def prune(self, now: float | None = None) -> int:
        """Delete files that are too old, and folders that are left empty; returns how many."""
        limit = (time.time() if now is None else now) - 60 * self.minutes
        count = 0
        for place, _, names in os.walk(self.root, topdown=False):
            folder = Path(place)
            for name in names:
                file = folder / name
                try:
                    if file.lstat().st_mtime < limit:
                        file.unlink()
                        count += 1
                except FileNotFoundError:
                    continue
            if folder != self.root:
                try:
                    if folder.stat().st_mtime < limit:
                        folder.rmdir()
                except OSError:  # not empty
                    continue
        return count

    def close(self) -> None:
        """Stop pruning."""
        self._closed.set()
        self._thread.join(1)

    def _loop(self) -> None:
        while not self._closed.wait(min(60.0, 30 * self.minutes)):
            self.prune()
