"""Blur with downsampling against the strided reference."""

import pytest
import torch
from ops.samples import BOUNDARIES, EMPTY, SAMPLES, SMALL, SPECTRAL

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate, assert_adjoint

all_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
FACTORS = (1, 2, 3, 5)  # the larger ones make more kernels direct
all_factors = pytest.mark.parametrize("factor", FACTORS)


@all_samples
@all_boundaries
@all_factors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_forward_is_accurate(sample, boundary, factor, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    assert_accurate(
        lambda x, k: ext.blur_downsample2d(x, k, factor, boundary=boundary),
        lambda x, k: reference.blur_downsample2d(x, k, factor, boundary=boundary),
        image,
        kernel,
        slack=32,
    )


@all_samples
@all_boundaries
@all_factors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint(sample, boundary, factor, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    size = (image.shape[2], image.shape[3])
    assert_adjoint(
        lambda x: ext.blur_downsample2d(x, kernel, factor, boundary=boundary),
        lambda r: ext.blur_downsample2d_adjoint(
            r, kernel, factor, boundary=boundary, image_size=size
        ),
        image,
        tolerance=1e-6 if dtype == torch.float32 else 1e-13,
    )


@pytest.mark.parametrize("sample", [*SMALL, SPECTRAL[3]], ids=str)
@all_boundaries
@pytest.mark.parametrize("factor", [2, 3])
def test_gradcheck_twice(sample, boundary, factor):
    image, kernel, _, _ = sample.tensors(boundary, torch.float64)
    small = ext.blur_downsample2d(image, kernel, factor, boundary=boundary)
    residual = torch.rand_like(small)
    size = (image.shape[2], image.shape[3])
    for tensor in (image, kernel, residual):
        tensor.requires_grad_()

    def forward(x, k):
        return ext.blur_downsample2d(x, k, factor, boundary=boundary)

    def adjoint(r, k):
        return ext.blur_downsample2d_adjoint(r, k, factor, boundary=boundary, image_size=size)

    for function, inputs in ((forward, (image, kernel)), (adjoint, (residual, kernel))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@all_samples
@all_boundaries
def test_opcheck(sample, boundary):
    image, kernel, _, _ = sample.tensors(boundary)
    ops = torch.ops.latentdem
    small = ext.blur_downsample2d(image, kernel, 2, boundary=boundary)
    tracked = (image.requires_grad_(), kernel.requires_grad_())
    torch.library.opcheck(ops.blur_downsample2d, (*tracked, boundary, 2))
    torch.library.opcheck(
        ops.blur_downsample2d_adjoint,
        (small, tracked[1], boundary, 2, list(image.shape[2:])),
    )


@all_boundaries
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_default_image_size(boundary, factor):
    kernel = torch.rand(1, 1, 3, 5)
    residual = torch.rand(2, 3, 6, 7)
    ours = ext.blur_downsample2d_adjoint(residual, kernel, factor, boundary=boundary)
    plain = reference.blur_downsample2d_adjoint(residual, kernel, factor, boundary=boundary)
    torch.testing.assert_close(ours, plain)
    again = ext.blur_downsample2d(ours, kernel, factor, boundary=boundary)
    assert again.shape == residual.shape


@pytest.mark.parametrize("sample", EMPTY, ids=str)
def test_empty_batch_strides_and_compile(sample):
    image, kernel, _, _ = sample.tensors("reflect")
    assert ext.blur_downsample2d(image, kernel, 2).shape == (0, 3, 4, 5)
    adjoint = ext.blur_downsample2d_adjoint(torch.rand(0, 3, 4, 5), kernel, 2, image_size=(8, 9))
    assert adjoint.shape == image.shape
    full, taps = torch.rand(2, 3, 8, 9), torch.rand(1, 1, 3, 3)

    def step(x, k):
        return ext.blur_downsample2d(x, k, 2, boundary="reflect").square().sum()

    grads = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        k = taps.clone().requires_grad_()
        x = full.contiguous(memory_format=torch.channels_last).requires_grad_()
        function(x, k).backward()
        grads.append((x.grad, k.grad))
        full = full.contiguous()
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"factor": 0}, ValueError, "factor must be at least 1, found 0"),
        ({"image": torch.rand(3, 8, 8)}, ValueError, r"image must have shape \[B,C,H,W\]"),
        ({"kernel": torch.rand(1, 1, 9, 3)}, ValueError, "no larger than image .*found 9 x 3"),
        ({"kernel": torch.rand(1, 2, 3, 3)}, ValueError, "kernel must have 1 channel or"),
        ({"boundary": "mirror"}, ValueError, "boundary must be one of .*'mirror'"),
        ({"image": torch.ones(1, 1, 8, 8).long()}, TypeError, "image must be float32"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {"image": torch.rand(2, 3, 8, 8), "kernel": torch.rand(1, 1, 3, 3), "factor": 2}
    with pytest.raises(error, match=text):
        ext.blur_downsample2d(**arguments | change)


def test_adjoint_rejects_a_contradiction():
    with pytest.raises(ValueError, match="residual must have the shape of the blurred and down"):
        ext.blur_downsample2d_adjoint(
            torch.rand(1, 1, 4, 4), torch.rand(1, 1, 3, 3), 2, image_size=(9, 8)
        )
