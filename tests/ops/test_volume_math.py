"""The arithmetic that CPU and GPU share, run one ray at a time as a GPU's thread would.

``tests/cuda_emulation/render_rays.cpp`` renders and differentiates with nothing but
``volume_render_math.h``. It is compiled for the host, and once more as the CUDA compiler sees the
header: with its macros defined and arrays in place of the host's vector types.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ops.test_volume_render import INPUTS, OUTPUTS, Scene, gradient, weigh

from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

ROOT = Path(__file__).resolve().parents[2]
F64 = torch.float64
COMPILER = shutil.which("c++")
TARGETS = {"host": [], "cuda": ["-D__CUDACC__", "-D__host__=", "-D__device__="]}
SCENES = [
    Scene((7, 6, 5)),
    Scene((6, 7, 8), image=(3, 10), samples=300),
    Scene((6, 6, 6), radius=0.3, near=0.0, far=2.0),
    Scene((1, 4, 3), image=(1, 7)),
]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=TARGETS)
def library(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / f"{request.param}.so"
    source = ROOT / "tests" / "cuda_emulation" / "render_rays.cpp"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
         "-Wno-psabi", *TARGETS[request.param], f"-I{ROOT / 'csrc'}", source, "-o", path],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(path))


class Emulated(torch.autograd.Function):
    @staticmethod
    def _call(ctx, name, *tensors):
        dtype = {torch.float32: "float", F64: "double"}[ctx.saved[0].dtype]
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (*ctx.saved, *tensors))
        function = getattr(ctx.library, f"{name}_{dtype}")
        function(ctx.sizes, ctx.strides, *map(ctypes.c_double, ctx.span), *pointers)

    @staticmethod
    def forward(ctx, library, options, density, color, pose, lens):
        ctx.library, ctx.span = library, (options["near"], options["far"])
        image, samples = options["image_size"], options["samples_per_ray"]
        views = pose.shape[0]
        ctx.sizes = (ctypes.c_int64 * 7)(*density.shape[1:], views, *image, samples)
        ctx.strides = (ctypes.c_int64 * 7)(
            *density.stride()[:0:-1], *color.stride()[:0:-1], color.stride(0)
        )
        ctx.saved = (density, color, pose[:, :3].double().contiguous(), lens.double().contiguous())
        ctx.dtypes = (pose.dtype, lens.dtype)
        outputs = tuple(density.new_empty(views, channels, *image) for channels in (3, 1, 1))
        Emulated._call(ctx, "forward", *outputs)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        found = [torch.zeros(t.shape, dtype=t.dtype) for t in ctx.saved]
        Emulated._call(ctx, "backward", *(g.contiguous() for g in grads), *found)
        found[2] = torch.nn.functional.pad(found[2], (0, 0, 0, 1))
        return None, None, *found[:2], found[2].to(ctx.dtypes[0]), found[3].to(ctx.dtypes[1])


def emulate(library):
    def render(*inputs, **options):
        return Emulated.apply(library, options, *inputs)

    return render


@pytest.mark.parametrize("scene", SCENES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("index", range(3), ids=OUTPUTS)
def test_forward(library, scene, dtype, index):
    assert_accurate(
        lambda *inputs: emulate(library)(*inputs, **scene.options)[index],
        lambda *inputs: reference.volume_render(*inputs, **scene.options)[index],
        *scene.tensors(dtype),
        slack=32,
    )


@pytest.mark.parametrize("scene", SCENES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("index", range(4), ids=INPUTS)
def test_gradients(library, scene, dtype, index):
    assert_accurate(
        gradient(emulate(library), index, scene.options),
        gradient(reference.volume_render, index, scene.options),
        *scene.tensors(dtype),
        slack=64,
    )


def test_any_strides(library):
    scene = SCENES[0]
    density, color, pose, lens = scene.tensors()
    strided = (
        density.mT.contiguous().mT,
        color.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    )
    plain = emulate(library)(density, color, pose, lens, **scene.options)
    found = emulate(library)(*strided, pose, lens, **scene.options)
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)
    assert weigh(found).isfinite()
