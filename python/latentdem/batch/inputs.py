"""What a batch works on: images of folders, globs, manifests and tar shards, with their names.

An image's id names its output.  It depends on the image's own input alone, never on what else
is given, so that adding inputs to a command repeats nothing.
"""

from __future__ import annotations

import csv
import glob
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from latentdem.io import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Suffixes that are taken for images in folders and shards."""

PARQUET = (".parquet", ".pq")
RESERVED = re.compile(
    r"\.|manifest.*\.sqlite|failed.*\.csv|(restored|kernel|comparison)\.(png|npy)|report\.json"
)
"""Beginnings of names that the output itself uses."""

MISSING = "missing"
SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    Attributes:
        id: its name in the output, with ``/`` between folders.
        input: what a user calls it.
        path: the file, or the shard that holds it.
        offset: first byte within a shard; None: the file is the image.
        size: bytes within a shard.
        stamp: size and time of the file; as long as it stays, the content is taken to be the same.
        kernel_size: of this image alone.
        noise_std: of this image alone.
        seed: of this image alone.
    """

    id: str
    input: str
    path: str
    offset: int | None = None
    size: int | None = None
    stamp: str = MISSING
    kernel_size: int | None = None
    noise_std: float | None = None
    seed: int | None = None

    def read(self) -> bytes:
        """The image file's bytes.

        Raises:
            InputError: it is not there, or cannot be read.
        """
        try:
            with Path(self.path).open("rb") as stream:
                if self.offset is None or self.size is None:
                    return stream.read()
                stream.seek(self.offset)
                content = stream.read(self.size)
        except FileNotFoundError:
            raise InputError(f"{self.input}: no such file") from None
        except OSError as error:
            raise InputError(f"{self.input}: cannot be read ({error.strerror})") from None
        if len(content) != self.size:
            raise InputError(f"{self.input}: the shard was cut off")
        return content


def stamp(path: str | os.PathLike[str]) -> str:
    """Size and time of a file, or that there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116  # millions of these: no Path objects
    except OSError:
        return MISSING
    return f"{status.st_size}:{status.st_mtime_ns}"


def check_id(name: str, source: str) -> str:
    """``name``, if its output lies within the output folder and hides no other file there.

    Raises:
        InputError: it would not; ``source`` is named.

    >>> check_id("trip/0001", "trip/0001.jpg")
    'trip/0001'
    """
    where = ascii(source) if not source.isprintable() else source
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name:
        raise InputError(f"{where}: '{name}' would be written outside the output; rename it")
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name + source):
        raise InputError(f"{where}: a name with control characters or not in UTF-8; rename it")
    for part in parts:
        if RESERVED.match(part):
            raise InputError(f"{where}: the output uses names like '{part}' itself; rename it")
        if len(part.encode()) > 200:
            raise InputError(f"{where}: a name of more than 200 bytes; shorten it")
    return name


def find_items(inputs: Iterable[str | os.PathLike[str]], output: Path) -> Iterator[Item]:
    """The images of ``inputs``, in an order that does not change.

    Args:
        inputs: folders (searched recursively), globs, images, CSV or Parquet manifests (column
            ``path``, relative to the manifest; optional ``id``, ``kernel_size``, ``noise_std``,
            ``seed``), and tar shards.
        output: left out, where it lies within an input.

    Raises:
        InputError: an input that is not there or holds no image, a bad manifest or shard, a name
            that cannot be used.
    """
    own = os.path.realpath(output)
    for given in map(str, inputs):
        path = Path(given)
        if path.is_dir():
            found = _folder(path, own)
        elif not path.exists() and glob.has_magic(given):
            found = _glob(given, own)
        else:
            found = _file(path)
        empty = True
        for item in found:
            empty = False
            yield item
        if empty:
            raise InputError(
                f"{given}: holds no image ({', '.join(IMAGES)}); shards and manifests of a folder "
                "are given by themselves, or as a glob in quotes"
            )


def _file(path: Path, name: str | None = None) -> Iterator[Item]:
    """A manifest, a shard or an image by the id ``name``."""
    lower = path.name.lower()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if lower.endswith(".csv"):
        yield from _csv(path)
    elif lower.endswith(PARQUET):
        yield from _parquet(path)
    elif lower.endswith(".tar"):
        yield from _shard(path)
    elif lower.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise InputError(f"{path}: shards are read in place, so they must not be compressed")
    else:
        name = check_id(path.stem if name is None else name, str(path))
        yield Item(name, str(path), str(path), stamp=stamp(path))


def _folder(folder: Path, own: str) -> Iterator[Item]:
    def visit(place: str, prefix: str) -> Iterator[Item]:
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{place}: cannot be read ({error.strerror})") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if os.path.realpath(entry.path) != own:
                    yield from visit(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(IMAGES) and entry.is_file():
                name = check_id(prefix + Path(entry.name).stem, entry.path)
                yield Item(name, entry.path, entry.path, stamp=stamp(entry.path))

    if os.path.realpath(folder) == own:
        raise InputError(f"{folder}: is the output folder; choose another one")
    yield from visit(str(folder), "")


def _glob(pattern: str, own: str) -> Iterator[Item]:
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    base = Path(*fixed)
    for found in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207
        path = Path(found)
        if path.is_dir() or os.path.realpath(path).startswith(own + os.sep):
            continue
        if path.name.lower().endswith((*IMAGES, *PARQUET, ".csv", ".tar")):
            yield from _file(path, path.relative_to(base).with_suffix("").as_posix())


def _shard(path: Path) -> Iterator[Item]:
    """Members that are images, by where they lie: nothing is unpacked, memory does not grow."""
    mark = stamp(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                vars(archive)["members"] = []  # else tarfile keeps every header
                name = PurePosixPath(member.name)
                hidden = any(part.startswith(".") and part != ".." for part in name.parts)
                if hidden or not name.name.lower().endswith(IMAGES) or not member.isreg():
                    continue
                source = f"{path}:{member.name}"
                if name.is_absolute() or ".." in name.parts or member.issparse():
                    raise InputError(
                        f"{source}: a member that is absolute, climbs out or is sparse; "
                        "the shard is refused"
                    )
                yield Item(
                    check_id(f"{path.stem}/{name.with_suffix('')}", source),
                    source,
                    str(path),
                    member.offset_data,
                    member.size,
                    f"{mark}:{member.offset_data}:{member.size}",
                )
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: not a tar shard, or cut off ({error})") from None


def _csv(path: Path) -> Iterator[Item]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            _check_columns(path, rows.fieldnames or [])
            for row in rows:
                yield _row(path, row, f"{path}, line {rows.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def _parquet(path: Path) -> Iterator[Item]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: Parquet manifests need pyarrow: pip install 'latentdem[parquet]', or give "
            "the manifest as CSV"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(path, names)
            number = 0
            for batch in file.iter_batches(columns=[n for n in names if n in COLUMNS]):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(path, row, f"{path}, row {number}")
    except (arrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


COLUMNS = ("path", "id", "kernel_size", "noise_std", "seed")


def _check_columns(path: Path, names: Iterable[str]) -> None:
    if "path" not in names:
        raise InputError(f"{path}: a manifest needs a column 'path', found {', '.join(names)}")


def _row(manifest: Path, row: Mapping[str, object], where: str) -> Item:
    def value(column: str) -> str | None:
        """What a cell says; nothing, if it is empty."""
        cell = row.get(column)
        if cell is None:
            return None
        text = str(cell).strip()
        return None if text.lower() in ("", "nan", "null") else text

    def integer(column: str) -> int | None:
        text = value(column)
        try:
            # Tables write whole numbers as 25.0 where other rows are empty.
            found = None if text is None else int(text.removesuffix(".0"))
            if found is None or -SEEDS <= found < SEEDS:
                return found
        except ValueError:
            pass
        raise InputError(f"{where}: {column} must be an integer of 64 bits, found '{text}'")

    def number(column: str) -> float | None:
        text = value(column)
        try:
            return None if text is None else float(text)
        except ValueError:
            raise InputError(f"{where}: {column} must be a number, found '{text}'") from None

    text = value("path")
    if text is None:
        raise InputError(f"{where}: no path")
    path = manifest.parent / text
    name = value("id")
    if name is None:
        inside = PurePosixPath(os.path.normpath(text))
        # What lies elsewhere is called by its own name, as an image given by itself.
        elsewhere = inside.is_absolute() or ".." in inside.parts
        name = inside.stem if elsewhere else str(inside.with_suffix(""))
    return Item(
        check_id(name, where),
        str(path),
        str(path),
        stamp=stamp(path),
        kernel_size=integer("kernel_size"),
        noise_std=number("noise_std"),
        seed=integer("seed"),
    )
