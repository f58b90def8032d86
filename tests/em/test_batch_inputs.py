"""What a batch works on: folders, globs, manifests, shards, and names that are refused."""

import csv
import io
import sys
import tarfile

import pytest
from em.batch_stand_in import make_folder, picture

from latentdem.batch.inputs import Item, check_id, find_items
from latentdem.io import InputError


def ids(*inputs, output):
    return [item.id for item in find_items(inputs, output)]


@pytest.fixture
def photos(tmp_path):
    return make_folder(tmp_path / "photos")


def test_folder(photos, tmp_path):
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / ".thumbnails").mkdir()
    picture(9).save(photos / ".thumbnails" / "9.png")
    out = photos / "out"
    (out / "1").mkdir(parents=True)
    picture(1).save(out / "1" / "restored.png")
    (photos / "sub" / "loop").symlink_to(photos)
    found = list(find_items([photos], out))
    assert [item.id for item in found] == ["1", "2", "4", "5", "sub/0", "sub/3"]
    assert all(item.read()[1:4] == b"PNG" and item.stamp != "missing" for item in found)
    with pytest.raises(InputError, match="is the output folder"):
        ids(photos, output=photos)


def test_globs_and_single_images(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert ids(f"{photos}/**/*.png", output=out) == ["1", "2", "4", "5", "sub/0", "sub/3"]
    assert ids(f"{photos}/*/[03].png", output=out) == ["sub/0", "sub/3"]
    # As when the shell had expanded it.
    assert ids(f"{photos}/?.png", output=out) == ids(*sorted(photos.glob("?.png")), output=out)
    monkeypatch.chdir(photos)
    assert ids("*.png", output=out) == ["1", "2", "4", "5"]
    strange = photos / "a[1].png"
    picture(1).save(strange)
    assert ids(strange, output=out) == ["a[1]"]
    picture(1).save(photos / "sub" / "restored.png")
    assert "sub/restored" in ids(photos, output=out)
    assert ids(f"{photos}/**/*.png", output=photos / "sub") == ["1", "2", "4", "5", "a[1]"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifests(photos, tmp_path, kind):
    path = tmp_path / f"list.{kind}"
    rows = [
        {"path": "photos/1.png", "kernel_size": 7, "noise_std": 0.02, "seed": 3, "id": "first"},
        {"path": "photos/sub/0.png", "kernel_size": None},
        {"path": str(photos / "2.png")},
        {"path": "photos/none.png", "id": " a/b "},
    ]
    columns = ["path", "kernel_size", "noise_std", "seed", "id", "camera"]
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow", reason="pip install 'latentdem[parquet]'")
        from pyarrow import parquet

        whole = {name: [row.get(name) for row in rows] for name in columns}
        parquet.write_table(arrow.table(whole), path)
    found = list(find_items([path], tmp_path / "out"))
    assert [item.id for item in found] == ["first", "photos/sub/0", "2", "a/b"]
    assert (found[0].kernel_size, found[0].noise_std, found[0].seed) == (7, 0.02, 3)
    assert (found[1].kernel_size, found[1].noise_std, found[1].seed) == (None, None, None)
    assert found[0].read() == (photos / "1.png").read_bytes()
    assert found[3].stamp == "missing"
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        found[3].read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.png\n", "needs a column 'path', found file"),
        ("path,seed\na.png,1.5\n", "line 2: seed must be an integer of 64 bits, found '1.5'"),
        ("path,seed\na.png,99999999999999999999\n", "seed must be an integer of 64 bits"),
        ("path,noise_std\na.png,low\n", "line 2: noise_std must be a number, found 'low'"),
        ("path,id\na.png,x\n,y\n", "line 3: no path"),
        ("path,id\na.png,../x\n", "line 2: '../x' would be written outside the output"),
        ("path,id\na.png,/x\n", "would be written outside"),
        ("path\n", "holds no image"),
        ("path\n\xff\n", "not a CSV file in UTF-8"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as error:
        ids(path, output=tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_of_tables(tmp_path):
    (tmp_path / "list.csv").write_text("path,kernel_size,noise_std\na.png,25.0,nan\nb.png,,\n")
    found = list(find_items([tmp_path / "list.csv"], tmp_path / "out"))
    assert [item.kernel_size for item in found] == [25, None]
    assert found[0].noise_std is None


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'latentdem\[parquet\]'"):
        ids(tmp_path / "list.parquet", output=tmp_path / "out")


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow", reason="pip install 'latentdem[parquet]'")
    (tmp_path / "list.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not a Parquet file"):
        ids(tmp_path / "list.parquet", output=tmp_path / "out")


def add(archive, name, content, kind=tarfile.REGTYPE, **header):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def test_shards_are_read_in_place(photos, tmp_path):
    path = tmp_path / "shard-07.tar"
    contents = {f"./{n}.png": (photos / f"{n}.png").read_bytes() for n in (1, 2, 4)}
    long = "deep/" * 30 + "5.png"
    contents[long] = (photos / "5.png").read_bytes()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "deep", b"", tarfile.DIRTYPE)
        for name, content in contents.items():
            add(archive, name, content)
            add(archive, name.replace(".png", ".json"), b"{}")
        add(archive, "./._1.png", b"of a Mac")
        add(archive, "link.png", b"", tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.png", b"", tarfile.LNKTYPE, linkname="./1.png")
    before = sorted(tmp_path.rglob("*"))
    found = list(find_items([path], tmp_path / "out"))
    assert [item.id for item in found] == [
        "shard-07/1", "shard-07/2", "shard-07/4", f"shard-07/{long.removesuffix('.png')}",
    ]  # fmt: skip
    assert [item.read() for item in found] == list(contents.values())
    assert sorted(tmp_path.rglob("*")) == before
    path.write_bytes(path.read_bytes()[: found[2].offset + 5])
    with pytest.raises(InputError, match="the shard was cut off"):
        found[2].read()
    with pytest.raises(InputError, match="not a tar shard, or cut off"):
        list(find_items([path], tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a/../../x.png", "a\\..\\x.png", "a\x01b.png", "report.json.png"]
)
def test_names_in_shards_cannot_escape(tmp_path, name):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        add(archive, name, b"content")
    with pytest.raises(InputError) as error:
        ids(tmp_path / "bad.tar", output=tmp_path / "out")
    assert "bad.tar" in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        add(archive, "x.png", b"content")
    with pytest.raises(InputError, match="must not be compressed"):
        ids(tmp_path / "a.tar.gz", output=tmp_path / "out")
    (tmp_path / "a.tar.gz").rename(tmp_path / "b.tar")
    with pytest.raises(InputError, match="not a tar shard"):
        ids(tmp_path / "b.tar", output=tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", "..", "a/../b", "./a", ".a", "a/.partial", "a\\b", "a\nb", "a\udc80",
     "manifest.sqlite", "manifest-3.sqlite-wal", "failed.csv", "a/report.json", "a/kernel.npy",
     "x" * 201],
)  # fmt: skip
def test_names_that_are_refused(name):
    with pytest.raises(InputError):
        check_id(name, "source")


@pytest.mark.parametrize("name", ["a", "a b/ü.1", "写真/一", "a..b", "kernel", "report"])
def test_names_that_are_taken(name):
    assert check_id(name, "source") == name


def test_missing_inputs(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        ids(tmp_path / "none.png", output=tmp_path / "out")
    with pytest.raises(InputError, match="holds no image"):
        ids(f"{tmp_path}/*.png", output=tmp_path / "out")
    with pytest.raises(InputError, match="cannot be read"):
        Item("x", "x", str(tmp_path)).read()
