"""Blur operators against the plain torch reference, their adjoints and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.samples import BOUNDARIES, EMPTY, SAMPLES, SMALL, SPECTRAL, Sample

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate, assert_adjoint

all_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


@all_samples
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_forward_is_accurate(sample, boundary, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    assert_accurate(
        lambda x, k: ext.blur_conv2d(x, k, boundary=boundary),
        lambda x, k: reference.blur_conv2d(x, k, boundary=boundary),
        image,
        kernel,
        slack=32,
    )


@all_samples
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_data_term_and_gradients_are_accurate(sample, boundary, dtype, masked):
    image, kernel, observation, mask = sample.tensors(boundary, dtype)
    tensors = (image, kernel, observation, *((mask,) if masked else ()))

    def part(function, index):
        def call(x, k, y, m=None):
            result = function(x, k, y, boundary=boundary, mask=m)
            return result if index is None else result[index]

        return call

    assert_accurate(
        part(ext.blur_data_term, None), part(reference.blur_data_term, None), *tensors, slack=64
    )
    for index in range(3):
        assert_accurate(
            part(ext.blur_gradients, index),
            part(reference.blur_gradients, index),
            *tensors,
            slack=64,
        )


@all_samples
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint_in_the_image(sample, boundary, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    assert_adjoint(
        lambda x: ext.blur_conv2d(x, kernel, boundary=boundary),
        lambda r: ext.blur_conv2d_adjoint(
            r, kernel, boundary=boundary, image_size=(image.shape[2], image.shape[3])
        ),
        image,
        tolerance=1e-6 if dtype == torch.float32 else 1e-13,
    )


@all_samples
@all_boundaries
def test_adjoint_in_the_kernel(sample, boundary):
    image, kernel, _, _ = sample.tensors(boundary)
    assert_adjoint(
        lambda k: ext.blur_conv2d(image, k, boundary=boundary),
        lambda r: torch.ops.latentdem.blur_conv2d_kernel(image, r, boundary, list(kernel.shape)),
        kernel,
    )


@pytest.mark.parametrize("sample", [*SMALL, SPECTRAL[3]], ids=str)
@all_boundaries
def test_gradcheck_twice(sample, boundary):
    if sample.kernel[2] * sample.kernel[3] > 100:
        sample = Sample((1, 1, 12, 11), (1, 1, 10, 9))  # spectral, yet small enough
    image, kernel, observation, mask = sample.tensors(boundary, torch.float64)
    for tensor in (image, kernel, observation):
        tensor.requires_grad_()
    height, width = image.shape[2:]

    def adjoint(r, k):
        return ext.blur_conv2d_adjoint(r, k, boundary=boundary, image_size=(height, width))

    def forward(x, k):
        return ext.blur_conv2d(x, k, boundary=boundary)

    def data_term(x, k, y):
        return ext.blur_data_term(x, k, y, boundary=boundary, mask=mask)

    for function, inputs in (
        (forward, (image, kernel)),
        (adjoint, (observation, kernel)),
        (data_term, (image, kernel, observation)),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_mask_gradient():
    image, kernel, observation, _ = SMALL[1].tensors("valid", torch.float64)
    mask = torch.rand(1, 3, *observation.shape[2:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m: ext.blur_data_term(image, kernel, observation, boundary="valid", mask=m), (mask,)
    )


@all_samples
@all_boundaries
def test_opcheck(sample, boundary):
    image, kernel, observation, mask = sample.tensors(boundary)
    ops = torch.ops.latentdem
    tracked = (image.requires_grad_(), kernel.requires_grad_())
    size = list(image.shape[2:])
    torch.library.opcheck(ops.blur_conv2d, (*tracked, boundary))
    torch.library.opcheck(ops.blur_conv2d_adjoint, (observation, kernel, boundary, size))
    torch.library.opcheck(
        ops.blur_conv2d_kernel, (image, observation, boundary, list(kernel.shape))
    )
    torch.library.opcheck(ops.blur_data_term, (*tracked, observation, mask, boundary))
    plain = (image.detach(), kernel.detach())
    torch.library.opcheck(ops.blur_gradients, (*plain, observation, None, boundary))


@pytest.mark.parametrize("sample", EMPTY, ids=str)
@all_boundaries
def test_empty_batch(sample, boundary):
    image, kernel, observation, _ = sample.tensors(boundary)
    out = ext.blur_conv2d(image, kernel, boundary=boundary)
    assert out.shape == observation.shape
    loss, grad_image, grad_kernel = ext.blur_gradients(
        image, kernel, observation, boundary=boundary
    )
    assert loss.shape == (0,)
    assert grad_image.shape == image.shape
    assert grad_kernel.abs().sum() == 0


@all_boundaries
def test_strides_do_not_matter(boundary):
    image, kernel, observation, _ = SPECTRAL[0].tensors(boundary)
    plain = ext.blur_gradients(image, kernel, observation, boundary=boundary)
    strided = ext.blur_gradients(
        image.contiguous(memory_format=torch.channels_last),
        kernel.transpose(-1, -2).contiguous().transpose(-1, -2),
        observation.repeat_interleave(2, -1)[..., ::2],
        boundary=boundary,
    )
    for left, right in zip(plain, strided, strict=True):
        assert torch.equal(left, right)


def test_batch_mates_do_not_matter():
    image, kernel, observation, _ = SPECTRAL[1].tensors("valid")
    together = ext.blur_gradients(image, kernel, observation, boundary="valid")
    alone = ext.blur_gradients(image[1:], kernel[1:], observation[1:], boundary="valid")
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left[1:], right, rtol=1e-6, atol=1e-7)


def test_centre_of_even_and_odd_kernels():
    image = torch.rand(1, 1, 9, 8)
    for size in (3, 4, 9, 8):
        kernel = torch.zeros(1, 1, min(size, 9), min(size, 8))
        kernel[..., kernel.shape[2] // 2, kernel.shape[3] // 2] = 1
        for boundary in BOUNDARIES[:-1]:
            out = ext.blur_conv2d(image, kernel, boundary=boundary)
            torch.testing.assert_close(out, image, rtol=0, atol=1e-6)


def test_compile_whole_data_term():
    image, kernel, observation, mask = SMALL[1].tensors("valid")

    def step(x, k):
        loss = ext.blur_data_term(x, k, observation, boundary="valid", mask=mask).sum()
        return loss + ext.blur_conv2d(x, k, boundary="reflect").mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tracked = image.clone().requires_grad_()
    compiled(tracked, kernel).backward()
    eager = image.clone().requires_grad_()
    step(eager, kernel).backward()
    torch.testing.assert_close(tracked.grad, eager.grad)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 3),
    height=st.integers(1, 26),
    width=st.integers(1, 26),
    data=st.data(),
    boundary=st.sampled_from(BOUNDARIES),
)
def test_any_shape(batch, channels, height, width, data, boundary):
    kernel = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    lead = (data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([1, channels])))
    sample = Sample((batch, channels, height, width), (*lead, *kernel))
    image, taps, observation, _ = sample.tensors(boundary, torch.float64)
    native = ext.blur_gradients(image, taps, observation, boundary=boundary)
    plain = reference.blur_gradients(image, taps, observation, boundary=boundary)
    for left, right in zip(native, plain, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"image": torch.rand(3, 8, 8)}, ValueError, r"image must have shape \[B,C,H,W\]"),
        ({"kernel": torch.rand(3, 3)}, ValueError, "kernel must have shape"),
        ({"kernel": torch.rand(3, 1, 3, 3)}, ValueError, "kernel must have batch size 1 or"),
        ({"kernel": torch.rand(1, 2, 3, 3)}, ValueError, "kernel must have 1 channel or"),
        ({"kernel": torch.rand(1, 1, 9, 3)}, ValueError, "no larger than image .*found 9 x 3"),
        ({"kernel": torch.rand(1, 1, 0, 3)}, ValueError, "kernel must not be empty"),
        ({"boundary": "mirror"}, ValueError, "boundary must be one of .*'mirror'"),
        ({"image": torch.ones(2, 3, 8, 8, dtype=torch.long)}, TypeError, "image must be float32"),
        ({"kernel": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, TypeError, "kernel must be float"),
        ({"observation": torch.rand(2, 3, 7, 8)}, ValueError, "observation must have the shape"),
        ({"mask": torch.rand(2, 3, 7, 8)}, ValueError, "mask must have shape"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {
        "image": torch.rand(2, 3, 8, 8),
        "kernel": torch.rand(1, 1, 3, 3),
        "observation": torch.rand(2, 3, 8, 8),
        "boundary": "circular",
        "mask": None,
    } | change
    with pytest.raises(error, match=text):
        ext.blur_gradients(**arguments)


def test_adjoint_rejects_a_contradiction():
    with pytest.raises(ValueError, match="residual must have the shape"):
        ext.blur_conv2d_adjoint(
            torch.rand(1, 1, 8, 8), torch.rand(1, 1, 3, 3), boundary="valid", image_size=(8, 8)
        )
