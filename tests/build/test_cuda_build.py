"""A module built with CUDA, on a machine without a GPU: `make cuda-build` runs this."""

import os

import pytest
import torch

import latentdem_ext as ext

INFO = ext.build_info()
REQUIRED = os.environ.get("LATENTDEM_REQUIRE_CUDA_BUILD") == "1"
with_cuda = pytest.mark.skipif(
    INFO["cuda"] is None and not REQUIRED, reason="built without CUDA (make cuda-build)"
)


def test_a_build_without_cuda_says_so():
    if INFO["cuda"] is None:
        assert not REQUIRED
        assert (INFO["cuda_archs"], INFO["cuda_kernels"]) == ([], [])


@with_cuda
def test_build_info_lists_version_architectures_and_kernels():
    assert INFO["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert any(arch.startswith("sm_") for arch in INFO["cuda_archs"])
    assert {"direct_forward", "direct_gradients", "spectral_gradients"} <= set(INFO["cuda_kernels"])


@with_cuda
def test_every_operator_has_a_cuda_implementation():
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("latentdem::")}
    assert len(names) > 20
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not {name for name in names if not has(name, "CUDA")}


@with_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_device_a_kernel_says_so():
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="no CUDA device is there"):
        torch.ops.latentdem.blur_conv2d.default.redispatch(
            cuda, torch.rand(1, 1, 8, 8), torch.rand(1, 1, 3, 3), "circular"
        )


@with_cuda
def test_the_cpu_path_is_there_as_well():
    image = torch.rand(1, 1, 8, 8)
    delta = torch.zeros(1, 1, 3, 3)
    delta[..., 1, 1] = 1
    assert torch.equal(ext.blur_conv2d(image, delta), image)
