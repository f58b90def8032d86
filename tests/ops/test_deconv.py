"""The Wiener step and Richardson-Lucy against plain torch, and against what they promise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.samples import BOUNDARIES, SAMPLES, SMALL, SPECTRAL, Sample

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate, assert_adjoint

all_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
RATIOS = ("number", "image", "bin", "shared bin")


def make_ratio(kind, image, dtype=None):
    batch, channels, height, width = image.shape
    shape = {
        "number": (),
        "image": (batch,),
        "bin": (batch, channels, height, width // 2 + 1),
        "shared bin": (1, 1, height, width // 2 + 1),
    }[kind]
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
    return weights.to(dtype or image.dtype)


# Wiener ---------------------------------------------------------------------------------


@all_samples
@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize(("masked", "passes"), [(False, 1), (False, 3), (True, 1), (True, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wiener_is_accurate(sample, kind, masked, passes, dtype):
    image, kernel, observation, mask = sample.tensors("circular", dtype)
    tensors = (image, observation, kernel, make_ratio(kind, image), *((mask,) if masked else ()))

    def call(function):
        return lambda x, y, k, r, m=None: function(x, y, k, r, mask=m, passes=passes)

    assert_accurate(call(ext.wiener_deconv2d), call(reference.wiener_deconv2d), *tensors, slack=32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wiener_accepts_half_precision(dtype):
    image, kernel, observation, _ = SPECTRAL[0].tensors("circular", dtype)
    out = ext.wiener_deconv2d(image, observation, kernel, 0.5)
    assert out.dtype == dtype
    exact = reference.wiener_deconv2d(image.double(), observation.double(), kernel.double(), 0.5)
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_wiener_is_the_minimiser():
    image, kernel, observation, _ = SPECTRAL[1].tensors("circular", torch.float64)
    ratio = torch.tensor([0.05, 2.0], dtype=torch.float64)
    x = ext.wiener_deconv2d(image, observation, kernel, ratio)
    _, gradient, _ = ext.blur_gradients(x, kernel, observation)
    assert (gradient + ratio.view(-1, 1, 1, 1) * (x - image)).abs().max() < 1e-10


def test_imputation_converges_to_the_masked_minimiser():
    image, kernel, observation, mask = SPECTRAL[2].tensors("circular", torch.float64)
    x = ext.wiener_deconv2d(image, observation, kernel, 0.5, mask=mask, passes=60)
    _, gradient, _ = ext.blur_gradients(x, kernel, observation, mask=mask)
    assert (gradient + 0.5 * (x - image)).abs().max() < 1e-8


def test_one_observation_serves_a_batch():
    image, kernel, observation, mask = SPECTRAL[0].tensors("circular", torch.float64)
    for m in (None, mask):
        shared = observation[:1].requires_grad_()
        out = ext.wiener_deconv2d(image, shared, kernel, 0.3, mask=m, passes=2)
        repeated = shared.detach().repeat(2, 1, 1, 1).requires_grad_()
        again = ext.wiener_deconv2d(image, repeated, kernel, 0.3, mask=m, passes=2)
        assert torch.equal(out, again)
        weight = torch.rand_like(out)
        (left,) = torch.autograd.grad((out * weight).sum(), shared)
        (right,) = torch.autograd.grad((again * weight).sum(), repeated)
        torch.testing.assert_close(left, right.sum(0, keepdim=True))


@pytest.mark.parametrize("masked", [False, True])
def test_wiener_adjoint_by_autograd(masked):
    image, kernel, _, mask = SPECTRAL[1].tensors("circular")
    mask, passes = (mask, 3) if masked else (None, 1)
    for name in ("image_hat", "observation"):
        zero = torch.zeros_like(image)

        def forward(t, name=name, zero=zero):
            inputs = {"image_hat": zero, "observation": zero} | {name: t}
            return ext.wiener_deconv2d(**inputs, kernel=kernel, ratio=0.2, mask=mask, passes=passes)

        def adjoint(r, forward=forward):
            t = torch.zeros_like(image, requires_grad=True)
            return torch.autograd.grad(forward(t), t, r)[0]

        assert_adjoint(forward, adjoint, image)


@pytest.mark.parametrize(
    "sample", [*SMALL, SPECTRAL[3], Sample((2, 2, 6, 9), (1, 2, 5, 4))], ids=str
)
@pytest.mark.parametrize("kind", RATIOS)
@pytest.mark.parametrize("masked", [False, True])
def test_wiener_gradcheck_twice(sample, kind, masked):
    image, kernel, observation, mask = sample.tensors("circular", torch.float64)
    ratio = make_ratio(kind, image)
    inputs = [t.requires_grad_() for t in (image, observation, kernel, ratio)]

    def function(x, y, k, r):
        m, passes = (mask, 3) if masked else (None, 1)
        return ext.wiener_deconv2d(x, y, k, r, mask=m, passes=passes)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_kernel_made_from_the_image_is_counted_once():
    """Under torch.func, and with create_graph, where the derivative is taken through torch."""
    image, kernel, observation, _ = SPECTRAL[0].tensors("circular", torch.float64)

    def loss(x, y, of=ext):
        # Small, positive, and the image's own.
        taps = kernel + 0.01 * x[..., : kernel.shape[-2], : kernel.shape[-1]].sigmoid().mean()
        return of.wiener_deconv2d(x, y, taps, 0.1).square().sum()

    inputs = (image.requires_grad_(), observation.requires_grad_())
    plain = torch.autograd.grad(loss(*inputs, of=reference), inputs)
    graph = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    func = torch.func.grad(loss, argnums=(0, 1))(image.detach(), observation.detach())
    for found in (torch.autograd.grad(loss(*inputs), inputs), graph, func):
        torch.testing.assert_close(tuple(found), plain)


@pytest.mark.parametrize("wanted", ["image_hat", "observation", "kernel", "ratio"])
@pytest.mark.parametrize("masked", [False, True])
def test_each_wiener_gradient_alone(wanted, masked):
    """What is not asked for is not computed, and what is asked for agrees with the reference."""
    image, kernel, observation, mask = SPECTRAL[0].tensors("circular", torch.float64)
    inputs = {
        "image_hat": image,
        "observation": observation,
        "kernel": kernel,
        "ratio": make_ratio("bin", image),
    }
    inputs[wanted].requires_grad_()
    settings = {"mask": mask if masked else None, "passes": 3}
    weight = torch.rand_like(image)
    found = [
        torch.autograd.grad((function(**inputs, **settings) * weight).sum(), inputs[wanted])[0]
        for function in (ext.wiener_deconv2d, reference.wiener_deconv2d)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@all_samples
def test_wiener_opcheck(sample):
    image, kernel, observation, mask = sample.tensors("circular")
    op = torch.ops.latentdem.wiener_deconv2d
    tracked = [t.requires_grad_() for t in (image, observation, kernel)]
    torch.library.opcheck(op, (*tracked, torch.tensor(0.1, requires_grad=True), mask, 2))
    torch.library.opcheck(op, (*tracked, make_ratio("bin", image), None, 1))
    plain = [t.detach() for t in tracked]
    torch.library.opcheck(
        torch.ops.latentdem.wiener_deconv2d_backward,
        (plain[0], *plain, torch.tensor(0.1), mask, 2, True, False, True),
    )
    torch.library.opcheck(
        torch.ops.latentdem.richardson_lucy,
        (plain[1], plain[2], plain[0], mask, "circular", 2, 0.01, 1e-7),
    )


def test_compile_and_strides():
    image, kernel, observation, mask = SPECTRAL[0].tensors("circular")

    def step(x, k):
        x = ext.wiener_deconv2d(x, observation, k, 0.1, mask=mask, passes=2)
        with torch.no_grad():
            u = ext.richardson_lucy(observation, k.detach(), iterations=2)
        return (x * u).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, step):
        x, k = image.clone().requires_grad_(), kernel.clone().requires_grad_()
        function(x, k).backward()
        grads.append((x.grad, k.grad))
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)
    strided = ext.wiener_deconv2d(
        image.contiguous(memory_format=torch.channels_last),
        observation.repeat_interleave(2, -1)[..., ::2],
        kernel.transpose(-1, -2).contiguous().transpose(-1, -2),
        0.1,
        mask=mask,
    )
    assert torch.equal(strided, ext.wiener_deconv2d(image, observation, kernel, 0.1, mask=mask))


def test_empty_batch():
    image, kernel = torch.rand(0, 3, 8, 9, requires_grad=True), torch.rand(1, 1, 3, 3)
    kernel.requires_grad_()
    out = ext.wiener_deconv2d(image, image.detach(), kernel, 0.1)
    assert out.shape == image.shape
    out.sum().backward()
    assert torch.equal(kernel.grad, torch.zeros_like(kernel))
    lucy = ext.richardson_lucy(image.detach(), kernel.detach(), iterations=2, boundary="valid")
    assert lucy.shape == (0, 3, 10, 11)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 2),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    passes=st.integers(1, 3),
    masked=st.booleans(),
    data=st.data(),
)
def test_wiener_any_shape(batch, channels, height, width, passes, masked, data):
    kernel = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    lead = (data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([1, channels])))
    sample = Sample((batch, channels, height, width), (*lead, *kernel))
    x, k, y, mask = sample.tensors("circular", torch.float64)
    ratio = make_ratio(data.draw(st.sampled_from(RATIOS)), x)
    arguments = {"mask": mask if masked else None, "passes": passes}
    native = ext.wiener_deconv2d(x, y, k, ratio, **arguments)
    plain = reference.wiener_deconv2d(x, y, k, ratio, **arguments)
    torch.testing.assert_close(native, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"image_hat": torch.rand(3, 8, 8)}, ValueError, r"image_hat must have shape \[B,C,H,W\]"),
        ({"observation": torch.rand(2, 3, 8, 7)}, ValueError, r"observation must .*\[B\|1,C,H,W\]"),
        ({"observation": torch.rand(3, 8, 8)}, ValueError, "observation must have shape"),
        ({"kernel": torch.rand(1, 1, 9, 3)}, ValueError, "no larger than image .*found 9 x 3"),
        ({"kernel": torch.ones(1, 1, 3, 3, dtype=torch.int)}, TypeError, "kernel must be float32"),
        ({"ratio": 0.0}, ValueError, "ratio must be positive, found 0.0"),
        ({"ratio": torch.rand(3)}, ValueError, r"ratio must be a scalar, .*found \[3\]"),
        ({"ratio": torch.rand(1, 1, 8, 8)}, ValueError, r"ratio must be .*\[1, 1, 8, 8\]"),
        ({"mask": torch.rand(2, 3, 8, 8)}, ValueError, r"mask must have shape \[B\|1,1,H,W\]"),
        ({"mask": torch.rand(1, 1, 8, 8).requires_grad_()}, ValueError, "mask must not require"),
        ({"passes": 0}, ValueError, "passes must be at least 1, found 0"),
    ],
)
def test_wiener_bad_arguments(change, error, text):
    arguments = {
        "image_hat": torch.rand(2, 3, 8, 8),
        "observation": torch.rand(2, 3, 8, 8),
        "kernel": torch.rand(1, 1, 3, 3),
        "ratio": 0.1,
    } | change
    with pytest.raises(error, match=text):
        ext.wiener_deconv2d(**arguments)


# Richardson-Lucy ------------------------------------------------------------------------


@all_samples
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("masked", "variation"), [(False, 0.0), (True, 0.0), (True, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_richardson_lucy_is_accurate(sample, boundary, masked, variation, dtype):
    _, kernel, observation, mask = sample.tensors(boundary, dtype)

    def call(function):
        return lambda y, k, m=None: function(
            y, k, iterations=4, boundary=boundary, mask=m, total_variation=variation, eps=1e-4
        )

    mask[..., 0, 0] = 1  # at least one pixel is seen
    tensors = (observation + 0.1, kernel, *((mask,) if masked else ()))
    # Transforms round by the largest value, here; the division by the weights, the share of the
    # kernel that sees a pixel, magnifies that at a valid convolution's corners.
    height, width = sample.image[2:]
    size = (height, width) if boundary == "valid" else None
    seen = mask if masked else torch.ones_like(mask)
    weights = ext.blur_conv2d_adjoint(
        seen.expand(observation.shape[0], 1, -1, -1).double(),
        kernel.double().mean(1, keepdim=True),
        boundary=boundary,
        image_size=size,
    )
    smallest = float(weights.min().clamp_min(1e-4)) if weights.numel() else 1.0
    slack = 32 / min(smallest, 1.0)
    assert_accurate(
        call(ext.richardson_lucy), call(reference.richardson_lucy), *tensors, slack=slack
    )


def blurred_scene():
    scene = torch.full((1, 1, 48, 40), 0.1, dtype=torch.float64)
    scene[..., 10:30, 12:20] = 1.0
    scene[..., 20:44, 25:35] = 0.6
    kernel = torch.rand(1, 1, 7, 6, dtype=torch.float64)
    return scene, kernel / kernel.sum()


def test_richardson_lucy_keeps_sign_and_flux_and_climbs():
    scene, kernel = blurred_scene()
    observed = torch.poisson(300 * ext.blur_conv2d(scene, kernel)) / 300
    image, likelihoods = None, []
    for _ in range(12):
        image = ext.richardson_lucy(observed, kernel, iterations=1, initial=image)
        assert image.min() >= 0
        assert float(image.sum()) == pytest.approx(float(observed.sum()), rel=1e-9)
        prediction = ext.blur_conv2d(image, kernel)
        likelihoods.append(float((observed * prediction.log() - prediction).sum()))
    assert all(b > a for a, b in pairwise(likelihoods))
    whole = ext.richardson_lucy(observed, kernel, iterations=12)
    torch.testing.assert_close(whole, image)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_richardson_lucy_sharpens(boundary):
    scene, kernel = blurred_scene()
    observed = ext.blur_conv2d(scene, kernel, boundary=boundary)
    found = ext.richardson_lucy(observed, kernel, iterations=60, boundary=boundary)
    inside = (..., slice(8, -8), slice(8, -8))
    if boundary == "valid":
        observed = torch.nn.functional.pad(observed, (2, 3, 3, 3))
    before, after = (float((x - scene)[inside].norm()) for x in (observed, found))
    assert after < 0.5 * before


def test_richardson_lucy_agrees_with_scikit_image():
    from skimage.restoration import richardson_lucy

    scene, kernel = blurred_scene()
    kernel = kernel[..., :5]  # scikit-image centres odd kernels only as we do
    kernel = kernel / kernel.sum()
    observed = ext.blur_conv2d(scene, kernel, boundary="zero")
    theirs = richardson_lucy(
        observed[0, 0].numpy(), kernel[0, 0].numpy(), num_iter=3, clip=False, filter_epsilon=1e-7
    )
    start = torch.full_like(observed, 0.5)
    ours = ext.richardson_lucy(observed, kernel, iterations=3, initial=start, boundary="zero")
    # They don't divide by the weight K'1, which is one only away from the border.
    inside = slice(17, -17), slice(15, -15)
    np.testing.assert_allclose(ours[0, 0].numpy()[inside], theirs[inside], rtol=1e-7)


def test_total_variation_smooths_and_unseen_pixels_stay():
    scene, kernel = blurred_scene()
    observed = (ext.blur_conv2d(scene, kernel) + 0.05 * torch.randn_like(scene)).clamp_min(0)

    def roughness(image):
        return float(image.diff(dim=-1).abs().sum() + image.diff(dim=-2).abs().sum())

    plain = ext.richardson_lucy(observed, kernel, iterations=30)
    smooth = ext.richardson_lucy(observed, kernel, iterations=30, total_variation=0.02)
    assert roughness(smooth) < 0.8 * roughness(plain)
    mask = torch.ones_like(observed)
    mask[..., :, :20] = 0
    start = torch.full_like(observed, 0.3)
    found = ext.richardson_lucy(observed, kernel, iterations=5, initial=start, mask=mask)
    assert torch.equal(found[..., 5:12], start[..., 5:12])
    assert (found[..., 24:] - 0.3).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"observation": -torch.ones(1, 1, 8, 8)}, ValueError, "observation must be non-negative"),
        ({"observation": torch.full((1, 1, 8, 8), torch.nan)}, ValueError, "found -?nan"),
        ({"kernel": -torch.ones(1, 1, 3, 3)}, ValueError, "kernel must be non-negative, found -1"),
        ({"initial": -torch.ones(1, 1, 8, 8)}, ValueError, "initial must be non-negative"),
        ({"mask": -torch.ones(1, 1, 8, 8)}, ValueError, "mask must be non-negative"),
        ({"mask": torch.ones(1, 1, 8, 7)}, ValueError, "mask must have shape"),
        ({"initial": torch.ones(1, 1, 9, 8)}, ValueError, "observation must have the shape"),
        ({"iterations": -1}, ValueError, "iterations must be non-negative, found -1"),
        ({"total_variation": 0.3}, ValueError, r"total_variation must be in \[0, 0.25\]"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"boundary": "mirror"}, ValueError, "boundary must be one of"),
        ({"kernel": torch.ones(1, 1, 3, 3).requires_grad_()}, ValueError, "kernel must not requ"),
        ({"observation": torch.ones(1, 1, 8, 8, dtype=torch.int)}, TypeError, "must be float32"),
    ],
)
def test_richardson_lucy_bad_arguments(change, error, text):
    arguments = {
        "observation": torch.rand(1, 1, 8, 8),
        "kernel": torch.rand(1, 1, 3, 3),
        "iterations": 2,
        "initial": torch.rand(1, 1, 8, 8),
    } | change
    with pytest.raises(error, match=text):
        ext.richardson_lucy(**arguments)
