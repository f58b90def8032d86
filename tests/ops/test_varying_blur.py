"""Spatially varying blur against one full convolution after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.samples import BOUNDARIES

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate, assert_adjoint

all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)

# image, kernels (leading batch 0: none), rows, columns, overlap
CASES = [
    ((2, 3, 24, 20), (0, 5, 4), 2, 2, 6),
    ((2, 2, 23, 31), (2, 4, 7), 3, 2, 5),
    ((1, 1, 30, 11), (1, 9, 11), 3, 1, 0),
    ((2, 1, 9, 8), (2, 9, 8), 2, 4, 2),  # kernels as large as the image
    ((1, 2, 16, 16), (0, 3, 3), 1, 1, 0),
    ((1, 1, 1, 1), (0, 1, 1), 1, 1, 0),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c[0])))


def tensors(case, boundary, dtype=torch.float32):
    shape, (batch, kh, kw), rows, columns, overlap = case
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)

    image = random(*shape)
    kernels = random(*([batch] if batch else []), rows * columns, kh, kw) / (kh * kw)
    weights = ext.blend_windows(*shape[2:], rows, columns, overlap, dtype=dtype)
    height, width = shape[2:]
    if boundary == "valid":
        height, width = height - kh + 1, width - kw + 1
    observation = random(*shape[:2], height, width)
    mask = (random(1, 1, height, width) > 0.3).to(dtype)
    return image, kernels, weights, observation, mask


@all_cases
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_accurate(case, boundary, dtype):
    image, kernels, weights, _, _ = tensors(case, boundary, dtype)
    assert_accurate(
        lambda *t: ext.varying_blur2d(*t, boundary=boundary),
        lambda *t: reference.varying_blur2d(*t, boundary=boundary),
        image,
        kernels,
        weights,
        slack=32,
    )


@all_cases
@all_boundaries
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_accurate(case, boundary, masked, dtype):
    image, kernels, weights, observation, mask = tensors(case, boundary, dtype)
    inputs = (image, kernels, weights, observation, *((mask,) if masked else ()))
    for index in range(3):

        def part(function, index=index):
            def call(x, k, w, y, m=None):
                return function(x, k, w, y, mask=m, boundary=boundary)[index]

            return call

        assert_accurate(
            part(ext.varying_blur_gradients),
            part(reference.varying_blur_gradients),
            *inputs,
            slack=64,
        )


@all_cases
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoints(case, boundary, dtype):
    image, kernels, weights, _, _ = tensors(case, boundary, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert_adjoint(
        lambda x: ext.varying_blur2d(x, kernels, weights, boundary=boundary),
        lambda r: ext.varying_blur2d_adjoint(r, kernels, weights, boundary=boundary),
        image,
        tolerance=tolerance,
    )
    batched = kernels if kernels.dim() == 4 else kernels[None]
    assert_adjoint(
        lambda k: ext.varying_blur2d(image, k, weights, boundary=boundary),
        lambda r: torch.ops.latentdem.varying_blur2d_kernels(
            image, r, weights, boundary, list(batched.shape)
        ),
        batched,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("case", CASES[3:], ids=lambda c: "x".join(map(str, c[0])))
@all_boundaries
def test_gradcheck_twice(case, boundary):
    image, kernels, weights, observation, _ = tensors(case, boundary, torch.float64)
    for tensor in (image, kernels, observation):
        tensor.requires_grad_()

    def forward(x, k):
        return ext.varying_blur2d(x, k, weights, boundary=boundary)

    def adjoint(r, k):
        return ext.varying_blur2d_adjoint(r, k, weights, boundary=boundary)

    for function, inputs in ((forward, (image, kernels)), (adjoint, (observation, kernels))):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@all_cases
@all_boundaries
def test_opcheck(case, boundary):
    image, kernels, weights, observation, mask = tensors(case, boundary)
    kernels = kernels if kernels.dim() == 4 else kernels[None]
    ops = torch.ops.latentdem
    tracked = (image.requires_grad_(), kernels.requires_grad_())
    torch.library.opcheck(ops.varying_blur2d, (*tracked, weights, boundary))
    torch.library.opcheck(ops.varying_blur2d_adjoint, (observation, kernels, weights, boundary))
    plain = (image.detach(), kernels.detach())
    torch.library.opcheck(
        ops.varying_blur2d_kernels,
        (plain[0], observation, weights, boundary, list(kernels.shape)),
    )
    torch.library.opcheck(
        ops.varying_blur_gradients, (*plain, weights, observation, mask, boundary)
    )


@all_boundaries
def test_equal_kernels_are_a_uniform_blur(boundary):
    image = torch.rand(1, 3, 40, 37, dtype=torch.float64)
    kernel = torch.rand(1, 1, 6, 9, dtype=torch.float64)
    weights = ext.blend_windows(40, 37, 3, 4, 7, dtype=torch.float64)
    varying = ext.varying_blur2d(image, kernel[0].expand(12, 6, 9), weights, boundary=boundary)
    uniform = ext.blur_conv2d(image, kernel, boundary=boundary)
    torch.testing.assert_close(varying, uniform, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 22),
    width=st.integers(1, 22),
    patches=st.integers(1, 4),
    boundary=st.sampled_from(BOUNDARIES),
    data=st.data(),
)
def test_any_box(height, width, patches, boundary, data):
    """Weights on arbitrary boxes, some of them around the border and some empty."""
    kh, kw = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    weights = torch.zeros(patches, height, width, dtype=torch.float64)
    for weight in weights:
        rows, columns = (
            torch.tensor(data.draw(st.lists(st.integers(0, side - 1), max_size=4))).long()
            for side in (height, width)
        )
        values = torch.rand(len(rows), len(columns), dtype=torch.float64)
        weight[rows[:, None], columns[None, :]] = values
    image = torch.rand(1, 2, height, width, dtype=torch.float64)
    kernels = torch.rand(patches, kh, kw, dtype=torch.float64)
    native = ext.varying_blur2d(image, kernels, weights, boundary=boundary)
    plain = reference.varying_blur2d(image, kernels, weights, boundary=boundary)
    torch.testing.assert_close(native, plain, rtol=1e-9, atol=1e-10)
    residual = torch.rand_like(plain)
    native = ext.varying_blur2d_adjoint(residual, kernels, weights, boundary=boundary)
    plain = reference.varying_blur2d_adjoint(residual, kernels, weights, boundary=boundary)
    torch.testing.assert_close(native, plain, rtol=1e-9, atol=1e-10)


def test_strides_empty_batch_and_threads():
    image, kernels, weights, observation, _ = tensors(CASES[1], "reflect")
    plain = ext.varying_blur_gradients(image, kernels, weights, observation, boundary="reflect")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        strided = ext.varying_blur_gradients(
            image.contiguous(memory_format=torch.channels_last),
            kernels.transpose(-1, -2).contiguous().transpose(-1, -2),
            weights.repeat_interleave(2, -1)[..., ::2],
            observation,
            boundary="reflect",
        )
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(plain, strided, strict=True):
        assert torch.equal(left, right)
    nothing = ext.varying_blur_gradients(image[:0], kernels[:1], weights, observation[:0])
    assert nothing[0].shape == (0,)
    assert nothing[1].shape == (0, 2, 23, 31)
    assert torch.equal(nothing[2], torch.zeros_like(kernels[:1]))


def test_compile():
    image, kernels, weights, _, _ = tensors(CASES[0], "valid")

    def step(x, k):
        y = ext.varying_blur2d(x, k, weights, boundary="valid")
        return ext.varying_blur2d_adjoint(y, k, weights, boundary="valid").square().sum()

    grads = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        x, k = image.clone().requires_grad_(), kernels.clone().requires_grad_()
        function(x, k).backward()
        grads.append((x.grad, k.grad))
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    data=st.data(),
)
def test_windows_sum_to_one(height, width, data):
    rows = data.draw(st.integers(1, height))
    columns = data.draw(st.integers(1, width))
    limits = [s // c for s, c in ((height, rows), (width, columns)) if c > 1]
    overlap = data.draw(st.integers(0, min(limits, default=10)))
    weights = ext.blend_windows(height, width, rows, columns, overlap, dtype=torch.float64)
    assert weights.shape == (rows * columns, height, width)
    assert (weights.sum(0) - 1).abs().max() < 1e-12
    assert weights.min() >= 0
    assert (weights.amax((1, 2)) > 0).all()


def test_windows_cross_fade():
    weights = ext.blend_windows(1, 8, 1, 2, 4)
    expected = torch.tensor([1, 1, 7 / 8, 5 / 8, 3 / 8, 1 / 8, 0, 0])
    torch.testing.assert_close(weights[0, 0], expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((8, 8, 9, 1, 0), r"rows must be between 1 and height \(8\), found 9"),
        ((8, 8, 1, 0, 0), r"columns must be between 1 and width \(8\), found 0"),
        ((8, 8, 2, 2, 5), "overlap must be between 0 and the smallest patch .4 pixels for 2 rows"),
        ((8, 8, 1, 1, -1), "overlap must be between 0 and"),
    ],
)
def test_bad_windows(arguments, text):
    with pytest.raises(ValueError, match=text):
        ext.blend_windows(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"image": torch.rand(3, 8, 8)}, ValueError, r"image must have shape \[B,C,H,W\]"),
        ({"kernels": torch.rand(3, 3)}, ValueError, "kernels must have shape"),
        ({"kernels": torch.rand(3, 2, 3, 3)}, ValueError, "kernels must have batch size 1 or"),
        ({"kernels": torch.rand(2, 9, 3)}, ValueError, "kernels must be no larger than image"),
        ({"kernels": torch.rand(2, 0, 3)}, ValueError, "kernels must not be empty"),
        ({"weights": torch.rand(3, 8, 8)}, ValueError, r"weights must .*\(2, 8, 8\), found"),
        ({"weights": torch.rand(8, 8)}, ValueError, "weights must have shape"),
        ({"boundary": "mirror"}, ValueError, "boundary must be one of .*'mirror'"),
        ({"image": torch.ones(2, 3, 8, 8, dtype=torch.long)}, TypeError, "image must be float32"),
        ({"weights": torch.ones(2, 8, 8, dtype=torch.bool)}, TypeError, "weights must be float"),
        ({"observation": torch.rand(2, 3, 7, 8)}, ValueError, "observation must have the shape"),
        ({"mask": torch.rand(2, 3, 7, 8)}, ValueError, "mask must have shape"),
    ],
)
def test_bad_arguments(change, error, text):
    arguments = {
        "image": torch.rand(2, 3, 8, 8),
        "kernels": torch.rand(2, 3, 3),
        "weights": torch.rand(2, 8, 8),
        "observation": torch.rand(2, 3, 8, 8),
    } | change
    with pytest.raises(error, match=text):
        ext.varying_blur_gradients(**arguments)


def test_other_refusals():
    image, kernels, weights = torch.rand(1, 1, 8, 8), torch.rand(2, 3, 3), torch.rand(2, 8, 8)
    with pytest.raises(ValueError, match="weights must not require a gradient"):
        ext.varying_blur2d(image, kernels, weights.requires_grad_())
    with pytest.raises(ValueError, match="residual must have the shape of the blurred image"):
        ext.varying_blur2d_adjoint(image, kernels, weights.detach(), boundary="valid")
