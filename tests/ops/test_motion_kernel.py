"""Kernel generators against dense sampling of the shapes that they integrate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import latentdem_ext as ext
from latentdem_ext.ops.motion_kernel import rasterize_path

centers = st.tuples(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))


def centroid(kernel):
    size = kernel.shape[-1]
    axis = torch.arange(size).double() - size // 2
    return float((kernel.sum(-1) * axis).sum()), float((kernel.sum(-2) * axis).sum())


def shake(size=25, batch=1, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return ext.camera_shake_kernel(size, batch, generator=generator, **options)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(3, 40), seed=st.integers(0, 2**31), data=st.data())
def test_camera_shake(size, seed, data):
    room = min((size - 1) // 2 - 0.5, 0.9)
    center = tuple(data.draw(st.floats(-room, room)) for _ in range(2))
    kernels = shake(size, 3, seed, center=center, dtype=torch.float64)
    assert kernels.shape == (3, 1, size, size)
    assert kernels.min() >= 0
    torch.testing.assert_close(kernels.sum((1, 2, 3)), torch.ones(3, dtype=torch.float64))
    for kernel in kernels[:, 0]:
        # A tap collects its pixel's time at the pixel's middle, half a pixel away at most.
        assert all(abs(a - b) <= 0.5 for a, b in zip(centroid(kernel), center, strict=True))


def test_camera_shake_is_reproducible_varied_and_large():
    assert torch.equal(shake(batch=4, seed=3), shake(batch=4, seed=3))
    kernels = shake(batch=64, dtype=torch.float64)
    assert kernels.flatten(1).unique(dim=0).shape[0] == 64
    extents = []
    for kernel in kernels[:, 0]:
        rows, columns = kernel.nonzero().unbind(-1)
        extents.append(int(max(rows.max() - rows.min(), columns.max() - columns.min())))
    assert 10 <= sum(extents) / 64 <= 23
    wide = shake(batch=64, reach=(1.0, 1.0))
    assert (wide > 0).sum() > (kernels > 0).sum()


@settings(max_examples=30, deadline=None)
@given(length=st.floats(0, 7.0), angle=st.floats(-4, 4), center=centers)
def test_straight_stroke(length, angle, center):
    size = 13
    kernel = ext.linear_motion_kernel(size, length, angle, center=center, dtype=torch.float64)
    t = (torch.arange(200_000).double() + 0.5) / 200_000 - 0.5
    rows = (center[0] + t * length * math.sin(angle) + 0.5).floor().long() + size // 2
    columns = (center[1] + t * length * math.cos(angle) + 0.5).floor().long() + size // 2
    counts = torch.bincount(rows * size + columns, minlength=size * size).reshape(size, size)
    # A sample on a pixel's border may fall to either side.
    assert (kernel[0, 0] - counts / 200_000).abs().max() < 1e-4 or length < 1e-6
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)


def test_known_strokes():
    horizontal = ext.linear_motion_kernel(5, 3.0, 0.0)[0, 0]
    expected = torch.zeros(5, 5)
    expected[2, 1:4] = 1 / 3
    torch.testing.assert_close(horizontal, expected)
    batch = ext.linear_motion_kernel(5, torch.tensor([3.0, 1.0]), math.pi / 2)
    torch.testing.assert_close(batch[0, 0], expected.T)
    assert float(batch[1, 0, 2, 2]) == pytest.approx(1, abs=1e-6)
    shifted = ext.linear_motion_kernel(5, 0.0, 0.0, center=(1.0, -2.0))
    assert float(shifted[0, 0, 3, 0]) == 1


@settings(max_examples=20, deadline=None)
@given(radius=st.floats(0.05, 4.5), center=centers)
def test_disc(radius, center):
    kernel = ext.defocus_kernel(11, radius, center=center, dtype=torch.float64)[0, 0]
    area = kernel * math.pi * radius**2

    def inside(y, x):
        return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2

    axis = (torch.arange(11 * 101).double() + 0.5) / 101 - 5.5
    hit = inside(axis[:, None], axis[None, :]).double().reshape(11, 101, 11, 101).mean((1, 3))
    assert (area - hit).abs().max() < 0.02
    assert float(area.max()) <= 1 + 1e-9
    # The whole disc is there: exact areas need no normalisation.
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)
    assert all(abs(a - b) < 0.5 for a, b in zip(centroid(kernel), center, strict=True))


def test_exact_disc_areas():
    kernel = ext.defocus_kernel(3, 1.0, dtype=torch.float64)[0, 0] * math.pi
    # The corner pixel holds the part of a quarter disc beyond 1/2 in both coordinates.
    corner = math.pi / 12 + 0.25 - math.sqrt(3) / 4
    assert float(kernel[0, 0]) == pytest.approx(corner, abs=1e-14)
    assert float(kernel[1, 1]) == pytest.approx(1, abs=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    major=st.floats(0.3, 3.0), ratio=st.floats(0.5, 1.0), angle=st.floats(0, 3.2), center=centers
)
def test_gaussian(major, ratio, angle, center):
    size, samples = 15, 60
    minor = max(0.3, ratio * major)
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()
    covariance = turn @ torch.diag(torch.tensor([major**2, minor**2]).double()) @ turn.T
    covariance = 0.5 * (covariance + covariance.T)
    found = ext.gaussian_kernel(size, covariance=covariance, center=center, dtype=torch.float64)
    axis = (torch.arange(size * samples).double() + 0.5) / samples - 0.5 - size // 2
    y, x = torch.meshgrid(axis - center[0], axis - center[1], indexing="ij")
    inverse = covariance.inverse()
    exponent = inverse[0, 0] * y * y + 2 * inverse[0, 1] * y * x + inverse[1, 1] * x * x
    mass = torch.exp(-0.5 * exponent).reshape(size, samples, size, samples).sum((1, 3))
    # The midpoint rule of the expectation errs by about (1 / samples)^2 / (24 sigma^2).
    assert (found[0, 0] - mass / mass.sum()).abs().max() < 1e-3 / samples / minor**2 + 1e-6


def test_gaussian_quadrature_meets_the_closed_form():
    covariance = torch.tensor([[0.09, 1e-13], [1e-13, 0.16]], dtype=torch.float64)
    quadrature = ext.gaussian_kernel(7, covariance=covariance, dtype=torch.float64)
    closed = ext.gaussian_kernel(7, covariance=torch.diag(covariance.diag()), dtype=torch.float64)
    assert (quadrature - closed).abs().max() < 1e-6
    torch.testing.assert_close(
        ext.gaussian_kernel(7, torch.tensor([0.5, 2.0]))[1:], ext.gaussian_kernel(7, 2.0)
    )


def test_dtype_and_dwell():
    assert shake(dtype=torch.float16).dtype == torch.float16
    points = torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]])
    taps = rasterize_path(points, 3, torch.tensor([3.0, 1.0]))
    expected = torch.tensor([0.375, 0.5, 0.125], dtype=torch.float64)
    torch.testing.assert_close(taps[1], expected)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: shake(2), "size must be at least 3 pixels, found 2"),
        (lambda: shake(9, reach=(0.0, 0.5)), "reach must satisfy"),
        (lambda: shake(9, center=(4.0, 0.0)), "center must leave a pixel on every side of size 9"),
        (lambda: ext.linear_motion_kernel(5, -1.0, 0.0), "length must be non-negative, found -1"),
        (lambda: ext.linear_motion_kernel(5, 7.0, 0.0), "length must keep .* size 5, found 1 pix"),
        (
            lambda: ext.linear_motion_kernel(5, torch.rand(2), torch.rand(3)),
            "length and angle must have one length",
        ),
        (lambda: ext.defocus_kernel(5, torch.rand(2, 2)), r"radius must be a number or \[B\]"),
        (lambda: ext.defocus_kernel(5, 0.0), "radius must be positive, found 0"),
        (lambda: ext.defocus_kernel(4, 2.0), "radius must keep the point spread inside size 4"),
        (lambda: ext.gaussian_kernel(5), "exactly one of sigma and covariance"),
        (lambda: ext.gaussian_kernel(5, -1.0), "sigma must be positive"),
        (lambda: ext.gaussian_kernel(0, 1.0), "size must be at least 1 pixel"),
        (lambda: ext.gaussian_kernel(5, covariance=torch.ones(2, 2)), "positive definite"),
        (lambda: ext.gaussian_kernel(5, covariance=torch.ones(3)), "covariance must have shape"),
        (lambda: rasterize_path(torch.rand(1, 2), 3), r"points must have shape \[N,2\]"),
        (lambda: rasterize_path(torch.rand(3, 2), 3, torch.rand(3)), r"dwell must have shape \[2"),
        (lambda: rasterize_path(torch.rand(3, 2) + 9, 3), "points must touch the support"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()
