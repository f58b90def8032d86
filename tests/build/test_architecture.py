"""The arrows of the code base: who may include and import whom; sizes; forbidden headers."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = [path for end in ("h", "cpp", "cu") for path in sorted((ROOT / "csrc").rglob(f"*.{end}"))]
PYTHON = [
    path
    for folder in ("latentdem_ext", "python", "tests", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

RAY_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def includes(path):
    return re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", CXX, ids=lambda p: p.name)
def test_kernels_see_no_torch(path):
    torch_headers = [i for i in includes(path) if re.match(r"(torch|ATen|c10)/", i)]
    # A *_glue.h holds tensor-level steps that several families' glue shares.
    glue = path.name.endswith(("_op.cpp", "_glue.h")) or path.parent.name == "bindings"
    if not glue and path.name not in ("checks.h", "dispatch.h"):
        assert torch_headers == []
    forbidden = {
        "torch/extension.h",
        "torch/all.h",
        "ATen/ATen.h",
        "ATen/Functions.h",
        "torch/csrc/autograd/custom_function.h",
        "ATen/cuda/CUDAContext.h",
    }
    assert not forbidden & set(torch_headers)


@pytest.mark.parametrize("path", CXX, ids=lambda p: p.name)
def test_layers_point_one_way(path):
    rank = {
        "common": 0,
        "blur": 1,
        "kernel_map": 1,
        "volume_render": 1,
        "deconv": 2,
        "varying_blur": 2,
        "bindings": 3,
    }
    own = path.parent.name
    for include in includes(path):
        other = include.split("/")[0]
        if other not in rank or other == own:
            continue
        api = include in ("bindings/api.h", "bindings/api_cuda.h") and "_op" in path.name
        allowed = rank[other] < rank[own] or api
        assert allowed, f"{path} includes {include}"


def test_every_source_is_in_the_build():
    text = (ROOT / "CMakeLists.txt").read_text()
    for path in CXX:
        assert path.suffix == ".h" or str(path.relative_to(ROOT)) in text


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_arrows(path):
    names = set(imports(path))
    roots = {name.split(".")[0] for name in names}
    relative = path.relative_to(ROOT).parts
    if relative[0] == "latentdem_ext":
        allowed = {"torch", "latentdem_ext", "__future__", "typing", "collections"}
        if relative[1] == "interop":
            # An adapter needs the one library that it is named after. Nothing imports adapters.
            allowed.add(path.stem)
        else:
            assert not any(name.startswith("latentdem_ext.interop") for name in names)
        assert roots <= allowed
    if relative[:2] == ("python", "latentdem"):
        assert not any("_C" in name.split(".") for name in names)
        assert "pickle" not in roots
        # Said to a user it is advice; only the call opens a pickle.
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Attribute)]  # fmt: skip
        assert "torch.load" not in calls


@pytest.mark.parametrize("path", [*CXX, *PYTHON], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 600


def test_environment_names():
    text = "\n".join(path.read_text() for path in [*PYTHON, ROOT / "setup.py"])
    for name in re.findall(r"environ(?:\.get\(|\[)['\"](\w+)", text):
        # What torchrun tells the processes that it starts, and what Ray reads when it starts.
        foreign = ("RANK", "WORLD_SIZE", "RAY_USAGE_STATS_ENABLED", RAY_ON_LOOPBACK)
        known = ("CUDA_HOME", "PYTHONPATH", *foreign)
        assert name.startswith("LATENTDEM_") or name in known


def test_torch_is_pinned_in_one_place():
    pins = [
        path.name
        for path in (ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run")
        if re.search(r"torch==\d", path.read_text().replace("TORCH=torch==2.12.0", ""))
    ]
    assert pins == ["Makefile"]


def test_no_test_photograph_is_in_the_manifest():
    manifest = json.loads(
        (ROOT / "python" / "latentdem" / "training" / "manifest.json").read_text()
    )
    hashes = {entry["sha256"] for entry in manifest["files"]}
    assert len(hashes) == len(manifest["files"])
    assert not any("motion" in entry["path"] for entry in manifest["files"])
    import hashlib

    from skimage import data_dir
    from sklearn.datasets import load_sample_images

    images = [*Path(data_dir).glob("*.*"), *(ROOT / "python" / "examples").glob("*.jpg")]
    images += [Path(name) for name in load_sample_images().filenames]
    assert len(images) > 10
    for image in images:
        assert hashlib.sha256(image.read_bytes()).hexdigest() not in hashes, image
