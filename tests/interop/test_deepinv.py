"""The deepinv adapters pass deepinv's own checks; and without deepinv, they say what to do.

deepinv imports torchvision for its data sets and plots, none of which is used here.  The wheel of
the package index does not load beside a CPU build of torch, so a stand-in takes its place.
"""

import builtins
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch

import latentdem_ext as ext

KERNEL = torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(0))
KERNEL = KERNEL / KERNEL.sum()
BOUNDARIES = ("circular", "reflect", "replicate", "zero", "valid")


def test_a_missing_deepinv_is_explained(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "deepinv":
            raise ModuleNotFoundError("No module named 'deepinv'", name="deepinv")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "latentdem_ext.interop.deepinv", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs deepinv: pip install 'latentdem\[deepinv\]'"):
        importlib.import_module("latentdem_ext.interop.deepinv")


TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.datasets.folder",
    "torchvision.datasets.utils",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


@pytest.fixture(scope="module")
def interop():
    # Installed and failing to import is a failure, not a reason to skip.
    if importlib.util.find_spec("deepinv") is None:
        pytest.skip("deepinv is not installed (make installs it): pip install --no-deps deepinv")
    with pytest.MonkeyPatch.context() as patch:
        for name in TORCHVISION:
            module = MagicMock(name=name, __path__=[], __spec__=ModuleSpec(name, None))
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("latentdem_ext.interop.deepinv")


def physics(interop, name, boundary):
    if name == "uniform":
        return interop.BlurPhysics(KERNEL, boundary=boundary)
    if name == "varying":
        weights = ext.blend_windows(20, 18, 2, 2, 6)
        return interop.VaryingBlurPhysics(KERNEL[0].repeat(4, 1, 1), weights, boundary=boundary)
    return interop.BlurDownsamplePhysics(KERNEL, 3, boundary=boundary, image_size=(20, 18))


@pytest.mark.parametrize("name", ["uniform", "varying", "downsample"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_deepinv_accepts_the_adjoint(interop, name, boundary):
    operator = physics(interop, name, boundary)
    x = torch.rand(1, 3, 20, 18)
    assert float(operator.adjointness_test(u=x).abs()) < 1e-5
    norm = float(operator.compute_norm(x, max_iter=2000, tol=1e-7, verbose=False, squared=False))
    if boundary == "circular" and name != "downsample":
        # The kernels are equal, non-negative and sum to one.
        assert norm == pytest.approx(1, abs=1e-3)
    else:
        y = operator.A(x)
        assert float(y.norm() / x.norm()) <= norm * 1.001


def test_a_kernel_given_in_a_call_stays(interop):
    operator = interop.BlurPhysics(KERNEL)
    x, other = torch.rand(1, 3, 20, 18), torch.ones(1, 1, 3, 3) / 9
    y = operator(x, kernel=other)
    assert torch.equal(y, ext.blur_conv2d(x, other))
    assert torch.equal(operator.A_adjoint(y), ext.blur_conv2d_adjoint(y, other))


@pytest.mark.parametrize("gamma", [0.7, torch.tensor([0.3, 4.0]).reshape(2, 1, 1, 1)])
def test_closed_form_prox_meets_the_solver(interop, gamma):
    operator = interop.BlurPhysics(KERNEL.double())
    z, y = torch.rand(2, 2, 3, 20, 18, dtype=torch.float64)
    found = operator.prox_l2(z, y, gamma)
    gradient = gamma * operator.A_adjoint(operator.A(found) - y) + found - z
    assert float(gradient.abs().max()) < 1e-12
    padded = interop.BlurPhysics(KERNEL.double(), boundary="reflect")
    found = padded.prox_l2(z, y, 0.7, max_iter=200, tol=1e-10)
    gradient = 0.7 * padded.A_adjoint(padded.A(found) - y) + found - z
    assert float(gradient.abs().max()) < 1e-6
