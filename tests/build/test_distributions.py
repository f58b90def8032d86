"""The source distribution holds what a build needs; wheels require the torch they are built for."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 60
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELEASE = torch.__version__.split("+")[0]


def backend(hook, folder, cwd=ROOT):
    """Run one hook of the build backend, as pip and build do: the path of what it made."""
    code = f"from setuptools import build_meta as b; print(b.{hook}({str(folder)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / run.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A clean copy of what is under version control, so that nothing else can slip in."""
    folder = tmp_path_factory.mktemp("sources")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if names.returncode != 0:
        pytest.skip("not a git clone: git tells which files belong to the sources")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    return backend("build_sdist", tmp_path_factory.mktemp("sdist"), cwd=sources)


def members(sdist):
    with tarfile.open(sdist) as archive:
        return {m.name.partition("/")[2]: m for m in archive.getmembers() if m.isfile()}


def test_everything_that_a_build_needs_is_in_the_sdist(sdist, sources):
    found = members(sdist)
    native = {p.relative_to(sources).as_posix() for p in (sources / "csrc").rglob("*.*")}
    assert len(native) > 80 and native <= set(found)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for name in re.findall(r"csrc/[\w/]+\.(?:cpp|cu|h\.in|h)\b", cmake):
        assert name in found, name
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        head = "" if package.startswith("latentdem_ext") else "python/"
        for path in (ROOT / head / package.replace(".", "/")).glob("*.py"):
            assert path.relative_to(ROOT).as_posix() in found, path
    for name in ("CMakeLists.txt", "LICENSE", "Makefile", "NOTICE", "README.md", "pyproject.toml",
                 "setup.py", "latentdem_ext/py.typed"):  # fmt: skip
        assert name in found
    assets = [p.relative_to(ROOT).as_posix() for p in (ROOT / "python/latentdem/assets").iterdir()]
    assert len(assets) == 8 and set(assets) <= set(found)


def test_nothing_else_is_in_the_sdist(sdist):
    found = members(sdist)
    assert not [name for name in found if name.endswith((".so", ".pyc", ".o"))]
    assert {name.split("/")[0] for name in found if "/" in name} == {
        "csrc", "latentdem.egg-info", "latentdem_ext", "python",
    }  # fmt: skip
    assert not any(member.issym() or member.islnk() for member in found.values())
    assert sdist.stat().st_size < LIMIT_MB * 1e6


def requirements(text):
    return re.findall(r"^Requires-Dist: (torch\b[^;\n]*)$", text, flags=re.M)


def test_the_sdist_is_for_every_torch_and_a_wheel_for_one(sdist, sources, tmp_path):
    with tarfile.open(sdist) as archive:
        name = next(n for n in archive.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", n))
        text = archive.extractfile(name).read().decode()
    assert requirements(text) == ["torch>=2.9"]
    metadata = backend("prepare_metadata_for_build_wheel", tmp_path, cwd=sources) / "METADATA"
    assert requirements(metadata.read_text()) == ["torch>=2.9", f"torch=={RELEASE}"]


def test_wheels_are_configured_for_every_python():
    if importlib.util.find_spec("cibuildwheel") is None:
        pytest.skip("no cibuildwheel: pip install cibuildwheel")
    run = subprocess.run(
        [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux",
         "--archs", "x86_64"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    versions = ["311", "312", "313"]
    assert run.stdout.split() == [f"cp{version}-manylinux_x86_64" for version in versions]


def test_wheels_are_built_for_the_torch_that_the_makefile_pins():
    options = PYPROJECT["tool"]["cibuildwheel"]
    assert "$(make -s torch-pin)" in options["before-build"]
    pin = subprocess.run(["make", "-s", "torch-pin"], cwd=ROOT, capture_output=True, text=True)
    assert pin.stdout.strip() in (ROOT / "Makefile").read_text()
    assert re.fullmatch(r"torch==[\d.]+", pin.stdout.strip())
    repair = options["linux"]["repair-wheel-command"]
    assert re.findall(r"--exclude '([\w*]+)'", repair) == ["libtorch*", "libc10*", "libgomp*"]


@pytest.mark.skipif(
    os.environ.get("LATENTDEM_BUILD_SDIST") != "1",
    reason="minutes of compiling (set LATENTDEM_BUILD_SDIST=1)",
)
def test_a_wheel_builds_from_the_sdist(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    (tmp_path / "wheel").mkdir()
    wheel = backend("build_wheel", tmp_path / "wheel", cwd=unpacked)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert requirements(next((tmp_path / "installed").glob("*/METADATA")).read_text())[-1] == (
        f"torch=={RELEASE}"
    )
    code = (
        "import torch, latentdem_ext as e; print(e.__file__, e.build_info()['torch'], "
        "float(e.blur_conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3) / 9).mean()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    path, built, mean = run.stdout.split()
    assert path.startswith(str(tmp_path)) and built == torch.__version__
    assert float(mean) == pytest.approx(1)
