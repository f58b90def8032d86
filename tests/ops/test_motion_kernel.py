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


MAKERS = {
    "stroke": lambda size, center: ext.linear_motion_kernel(
        size, torch.tensor([0.6, 3.7]), 0.6, center=center, dtype=torch.float64
    ),
    "disc": lambda size, center: ext.defocus_kernel(
        size, torch.tensor([0.4, 2.3]), center=center, dtype=torch.float64
    ),
    "gaussian": lambda size, center: ext.gaussian_kernel(
        size, torch.tensor([0.3, 0.8]), center=center, dtype=torch.float64
    ),
    "path": lambda size, center: rasterize_path(
        torch.tensor([[-1.5, 0.2], [0.4, 1.3], [2.0, -1.0]]).double()
        + torch.tensor(center, dtype=torch.float64),
        size,
    )[None, None],
}
makers = st.sampled_from(sorted(MAKERS))


@settings(max_examples=60)
@given(maker=makers, size=st.integers(17, 24), center=centers, data=st.data())
def test_a_shift_moves_the_kernel(maker, size, center, data):
    """By whole pixels every tap moves; in between the centre of mass follows, never backwards."""
    whole = data.draw(st.tuples(st.integers(-3, 3), st.integers(-3, 3)))
    there = (center[0] + whole[0], center[1] + whole[1])
    here = MAKERS[maker](size, center)
    assert here.min() >= 0
    torch.testing.assert_close(here.sum((-2, -1)), torch.ones_like(here[..., 0, 0]))
    moved = MAKERS[maker](size, there)
    # A gaussian is cut by the support, elsewhere in a different place.
    torch.testing.assert_close(here.roll(whole, (-2, -1)), moved, rtol=0, atol=1e-8)
    step = data.draw(st.floats(0, 0.9))
    further = MAKERS[maker](size, (center[0] + step, center[1]))
    for a, b in zip(here[:, 0], further[:, 0], strict=True):
        assert centroid(b)[0] >= centroid(a)[0] - 1e-9
        assert centroid(b)[1] == pytest.approx(centroid(a)[1], abs=1e-9)


@settings(max_examples=30)
@given(center=centers, sigma=st.floats(0.7, 1.5), length=st.integers(1, 6))
def test_centre_of_mass_of_a_subpixel_shift(center, sigma, length):
    """It follows exactly where the shape leaves nothing for the pixel grid to alias."""
    gaussian = ext.gaussian_kernel(25, sigma, center=center, dtype=torch.float64)[0, 0]
    aliased = math.exp(-2 * (math.pi * sigma) ** 2) / math.pi
    assert centroid(gaussian) == pytest.approx(center, abs=1.01 * aliased + 1e-9)
    stroke = ext.linear_motion_kernel(13, length, 0.0, center=center, dtype=torch.float64)[0, 0]
    assert centroid(stroke)[1] == pytest.approx(center[1], abs=1e-9)


@settings(max_examples=25)
@given(size=st.integers(3, 30), batch=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_camera_shake_is_decided_by_its_generator(size, batch, seed):
    first, again = (torch.Generator().manual_seed(seed) for _ in range(2))
    one = ext.camera_shake_kernel(size, batch, generator=first, dtype=torch.float64)
    state = torch.random.get_rng_state()
    two = ext.camera_shake_kernel(size, batch, generator=again, dtype=torch.float64)
    assert torch.equal(one, two)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers
    assert torch.equal(first.get_state(), again.get_state())
    later = ext.camera_shake_kernel(size, batch, generator=first, dtype=torch.float64)
    assert not torch.equal(one, later)
    assert (one.sum((-2, -1)) - 1).abs().max() < 1e-12


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
