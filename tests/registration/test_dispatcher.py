"""Both faces of the operators agree, and the stubs describe what is there."""

import ast
import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch

import latentdem_ext as ext
from latentdem_ext import _C

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [name for name in dir(_C) if not name.startswith("_") and name != "build_info"]


def call_both(name, *arguments):
    return getattr(_C, name)(*arguments), getattr(torch.ops.latentdem, name)(*arguments)


def arguments(name):
    image, kernel = torch.rand(2, 3, 12, 10), torch.rand(2, 1, 5, 4)
    kernels, weights = torch.rand(2, 4, 5, 4), ext.blend_windows(12, 10, 2, 2, 3)
    grid, tints, image_like = torch.rand(1, 4, 5, 6), torch.rand(3, 4, 5, 6), torch.rand(2, 1, 3, 4)
    colors = image_like.expand(2, 3, 3, 4)
    pose = ext.pose_from_spherical(torch.tensor([10.0, 20.0]), torch.tensor([0.0, 50.0]), 3.0)
    lens = ext.intrinsics_from_fov(torch.tensor([40.0, 50.0]), (3, 4))
    lags, rhs = ext.kernel_map_statistics(image, image, (5, 4))
    return {
        "blur_conv2d": (image, kernel, "reflect"),
        "blur_conv2d_adjoint": (image, kernel, "zero", [12, 10]),
        "blur_conv2d_kernel": (image, image, "circular", [2, 1, 5, 4]),
        "blur_downsample2d": (image, kernel, "valid", 3),
        "blur_downsample2d_adjoint": (torch.rand(2, 3, 4, 4), kernel, "circular", 3, [12, 10]),
        "blur_data_term": (image, kernel, image, None, "circular"),
        "blur_gradients": (image, kernel, image, image, "replicate"),
        "kernel_map_statistics": (image, image, None, [5, 4], "gradient", 0.1, None),
        "kernel_map_prepare": (image, None, [5, 4], "gradient"),
        "kernel_map_solve": (lags, rhs, kernel[:, 0], kernel[:, 0], 1.0, 2),
        "kernel_map_update": (
            image, image, kernel, None, 0.1, 1e3, 1.0, 2, "l2", "image", True, 0.0, 3, None,
        ),
        "project_simplex": (kernel,),
        "recenter_kernel": (kernel, True),
        "wiener_deconv2d": (image, image, kernel, torch.tensor(0.1), None, 1),
        "wiener_deconv2d_backward": (
            image, image, image, kernel, torch.rand(2), None, 1, True, True, True,
        ),
        "richardson_lucy": (image, kernel, image, None, "reflect", 3, 0.01, 1e-7),
        "varying_blur2d": (image, kernels, weights, "circular"),
        "varying_blur2d_adjoint": (image, kernels, weights, "reflect"),
        "varying_blur2d_kernels": (image, image, weights, "zero", [2, 4, 5, 4]),
        "varying_blur_gradients": (image, kernels, weights, image, None, "replicate"),
        "volume_render": (grid, tints, pose, lens, [3, 4], 1.0, 5.0, 16, None),
        "volume_render_backward": (
            colors, image_like, image_like, grid, tints, pose, lens,
            1.0, 5.0, 16, 0.0, True, True, True,
        ),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_pybind_and_torch_ops_agree(name):
    left, right = call_both(name, *arguments(name))
    left, right = ((x,) if isinstance(x, torch.Tensor) else x for x in (left, right))
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def test_pybind_carries_autograd_and_value_errors():
    image = torch.rand(1, 1, 8, 8, requires_grad=True)
    _C.blur_conv2d(image, torch.rand(1, 1, 3, 3), "circular").sum().backward()
    assert image.grad is not None
    with pytest.raises(ValueError, match="boundary must be one of"):
        _C.blur_conv2d(image, torch.rand(1, 1, 3, 3), "mirror")


def test_stub_matches_the_module():
    tree = ast.parse((ROOT / "latentdem_ext" / "_C.pyi").read_text())
    stubs = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert sorted(stubs) == sorted([*OPERATORS, "build_info"])
    for name in OPERATORS:
        schema = getattr(torch.ops.latentdem, name).default._schema
        assert [a.arg for a in stubs[name].args.args] == [a.name for a in schema.arguments]
        assert f"{name}(" in (getattr(_C, name).__doc__ or "")


def test_every_public_operator_has_a_reference_with_the_same_arguments():
    from latentdem_ext import ops, reference

    assert set(ops.__all__) == set(reference.__all__)
    for name in ops.__all__:
        public = inspect.signature(getattr(ops, name)).parameters
        plain = inspect.signature(getattr(reference, name)).parameters
        assert list(public) == list(plain), name


def test_build_info():
    info = ext.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["openmp"] is True
    assert info["compiler"]
    assert "cuda" in info


def test_results_do_not_depend_on_the_thread_count():
    image, kernel = torch.rand(2, 3, 40, 37), torch.rand(2, 1, 5, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ext.blur_gradients(image, kernel, image))
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_operators_pickle():
    restored = pickle.loads(pickle.dumps(ext.blur_conv2d))
    image, kernel = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 3, 3)
    assert torch.equal(restored(image, kernel), ext.blur_conv2d(image, kernel))


def test_a_mismatched_torch_is_explained(monkeypatch):
    loader = importlib.import_module("latentdem_ext._load")
    monkeypatch.setattr(loader.torch, "__version__", "1.0.0")
    with pytest.raises(ImportError, match=r"built for torch .* but torch 1.0.0 is installed"):
        loader.load()
