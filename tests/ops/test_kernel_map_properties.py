"""What the kernel estimate and the projections promise, on drawn shapes, options and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.strategies import draws, dtypes, on_simplex, seeds, sizes

import latentdem_ext as ext
from latentdem_ext import reference


def shrink(kernel, strength):
    return on_simplex((kernel - 0.02 * strength).clamp_min(0) + 1e-6)


@st.composite
def problems(draw, high=18):
    """Tensors and options of ``kernel_map_update``; blurred scenes and unrelated pairs."""
    height, width, kh, kw = draw(sizes(high, kernel=7))
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    uniform = draws(draw(seeds), draw(dtypes))
    image = uniform(batch, channels, height, width)
    truth = on_simplex(uniform(batch, 1, kh, kw) ** 3 + 1e-3)
    related = draw(st.booleans())
    observation = ext.blur_conv2d(image, truth) if related else uniform(*image.shape)
    options = {
        "noise_std": draw(st.sampled_from([0.01, 0.1])),
        "penalty": draw(st.sampled_from([1e2, 1e4, 1e6])),
        "regularization": draw(st.sampled_from([0.0, 1.0, 300.0])),
        "iterations": draw(st.integers(1, 4)),
        "prior": draw(st.sampled_from(["none", "l1", "l2", shrink])),
        "domain": draw(st.sampled_from(["image", "gradient"])),
        "support_exact": draw(st.booleans()),
        "window": draw(st.sampled_from([None, uniform(1, 1, height, width)])),
        "image_variance": draw(st.sampled_from([0.0, 1e-3])),
    }
    return image, observation, on_simplex(uniform(batch, 1, kh, kw) + 1e-3), options


@settings(max_examples=80)
@given(problems(), st.data())
def test_an_estimate_is_a_kernel_whatever_its_batch_mates(problem, data):
    image, observation, start, options = problem
    found = ext.kernel_map_update(image, observation, start, **options)
    assert found.shape == start.shape
    assert found.dtype == start.dtype
    assert found.min() >= 0
    tolerance = 100 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.sum((-2, -1)), torch.ones_like(found[..., 0, 0]), rtol=0, atol=tolerance
    )
    # With the transforms of csrc/common/fft.h bit for bit; torch's round differently in a batch.
    fields = {name: options[name] for name in ("domain", "window")}
    native = ext.kernel_map_prepare(observation, tuple(start.shape[-2:]), **fields).numel() > 0
    if exactly := options["support_exact"] and native:
        inputs = (image, observation, start)
    else:
        inputs = (image.double(), observation.double(), start.double())
    together = ext.kernel_map_update(*inputs, **options)
    order = data.draw(st.permutations(range(len(image))))
    for choice in (order, order[:1]):
        apart = ext.kernel_map_update(*(t[choice] for t in inputs), **options)
        tolerance = 0 if exactly else 1e-6
        torch.testing.assert_close(apart, together[choice], rtol=0, atol=tolerance)


@settings(max_examples=40)
@given(problems())
def test_estimates_follow_the_symmetries_of_the_problem(problem):
    """Units, shifts of a periodic scene, transposition: the model does not change under them."""
    image, observation, start, options = problem
    image, observation, start = image.double(), observation.double(), start.double()
    window = options["window"] = None if options["window"] is None else options["window"].double()
    # Enough steps for an exact solution; fewer are not the same ones in every frame.
    options |= {"solver_steps": 4 * start[0].numel(), "penalty": 1e6}

    def update(x, y, k, **change):
        return ext.kernel_map_update(x, y, k, **options | change)

    found = update(image, observation, start)
    same = {"rtol": 1e-6, "atol": 1e-8}
    scaled = update(
        16 * image,
        16 * observation,
        start,
        noise_std=16 * options["noise_std"],
        image_variance=256 * options["image_variance"],
    )
    torch.testing.assert_close(scaled, found, **same)
    if window is None:
        rolled = update(image.roll((3, 1), (2, 3)), observation.roll((3, 1), (2, 3)), start)
        torch.testing.assert_close(rolled, found, **same)
    turned = update(
        image.mT, observation.mT, start.mT, window=None if window is None else window.mT
    )
    torch.testing.assert_close(turned.mT, found, **same)


@settings(max_examples=30)
@given(problems())
def test_without_weight_all_priors_agree(problem):
    image, observation, start, options = problem
    options |= {"regularization": 0.0}
    found = [
        ext.kernel_map_update(image, observation, start, **options | {"prior": prior})
        for prior in ("none", "l1", "l2", lambda kernel, strength: kernel)
    ]
    tolerance = 1e-4 if start.dtype == torch.float32 else 1e-9
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=tolerance)


@settings(max_examples=60)
@given(problems(high=12), st.integers(0, 8))
def test_support_exact_solves_the_restricted_normal_equations(problem, steps):
    """No kernel on the support does better, least of all the one cropped from the full grid."""
    image, observation, target, options = problem
    image, observation, target = image.double(), observation.double(), target.double()
    kept = {name: options[name] for name in ("domain", "image_variance")}
    kept["window"] = None if options["window"] is None else options["window"].double()
    kh, kw = target.shape[-2:]
    lags, rhs = ext.kernel_map_statistics(image, observation, (kh, kw), **kept)
    alpha = options["noise_std"] ** 2 * options["penalty"]

    def residual(kernel):
        field = torch.nn.functional.conv2d(
            kernel[:, 0][None], lags[:, None], padding=(kh - 1, kw - 1), groups=len(kernel)
        )[0]
        return field + alpha * kernel[:, 0] - rhs - alpha * target[:, 0]

    def energy(kernel):
        # 1/2 k' A k - b' k + alpha/2 |k - z|^2, from its gradient.
        own = residual(kernel) - rhs - alpha * target[:, 0]
        return 0.5 * (kernel[:, 0] * own).sum((-2, -1))

    cropped = ext.kernel_map_update(
        image,
        observation,
        target,
        noise_std=options["noise_std"],
        penalty=options["penalty"],
        regularization=0.0,
        iterations=1,
        prior="none",
        support_exact=False,
        **kept,
    )

    def solve(count):
        z = target[:, 0]
        return ext.kernel_map_solve(lags, rhs, z, z, alpha=alpha, steps=count)[:, None]

    exact = solve(6 * kh * kw)
    scale = float(rhs.abs().max() + alpha)
    assert float(residual(exact).abs().max()) <= 1e-6 * scale
    assert (
        residual(exact).norm(dim=(1, 2)) <= residual(cropped).norm(dim=(1, 2)) + 1e-6 * scale
    ).all()
    slack = 1e-9 * (energy(target).abs() + scale)
    assert (energy(exact) <= energy(cropped) + slack).all()
    # Every conjugate gradient step descends.
    assert (energy(solve(steps + 1)) <= energy(solve(steps)) + slack).all()


@settings(max_examples=50)
@given(problems())
def test_preparing_an_observation_changes_nothing(problem):
    image, observation, start, options = problem
    size = tuple(start.shape[-2:])
    fields = {name: options[name] for name in ("domain", "window")}
    prepared = ext.kernel_map_prepare(observation, size, **fields)
    assert prepared.shape[:2] == (
        len(image),
        image.shape[1] * (2 if options["domain"] == "gradient" else 1),
    )
    assert prepared.dtype == start.dtype
    plain = ext.kernel_map_update(image, observation, start, **options)
    # On the full grid nothing can be prepared, and what was is ignored.
    quick = ext.kernel_map_update(image, observation, start, prepared=prepared, **options)
    assert torch.equal(plain, quick)
    alone = ext.kernel_map_prepare(observation[-1:], size, **fields)
    assert torch.equal(alone, prepared[-1:])


@st.composite
def planes(draw):
    """Values with ties, large gaps and both signs."""
    kh, kw = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    value = st.one_of(
        st.floats(-2, 2, width=32),
        st.floats(-1e4, 1e4, width=32),
        st.sampled_from([0.0, 0.5, 1.0, -1.0]),
    )
    values = draw(st.lists(value, min_size=kh * kw, max_size=kh * kw))
    return torch.tensor(values, dtype=torch.float64).reshape(kh, kw)


@settings(max_examples=150)
@given(planes(), planes(), dtypes)
def test_simplex_projection_is_the_nearest_point(plane, other, dtype):
    plane, other = plane.to(dtype), other.to(dtype)
    found = ext.project_simplex(plane)
    eps = torch.finfo(dtype).eps
    tolerance = 8 * plane.numel() * eps
    # Rounding of the threshold, which is as large as the largest value.
    rounding = tolerance + 4 * eps * float(plane.abs().max())
    torch.testing.assert_close(found, reference.project_simplex(plane), rtol=0, atol=rounding)
    assert found.min() >= 0
    assert abs(float(found.sum()) - 1) <= tolerance
    torch.testing.assert_close(ext.project_simplex(found), found, rtol=0, atol=2 * tolerance)
    # KKT: a multiplier tau with k = v - tau where k > 0 and v <= tau elsewhere.
    active = found > 0
    tau = (plane - found)[active]
    assert float(tau.max() - tau.min()) <= rounding
    assert not (plane[~active] > tau.max() + rounding).any()
    # A projection onto a convex set brings points nearer to each other.
    if other.shape == plane.shape:
        gap = float((ext.project_simplex(other) - found).norm())
        assert gap <= float((other - plane).norm()) + rounding + 4 * eps * float(other.abs().max())
    # Neither a constant nor the order matters.
    torch.testing.assert_close(
        ext.project_simplex(plane + 1), found, rtol=0, atol=rounding + 8 * eps
    )
    assert torch.allclose(ext.project_simplex(plane.flip(0)).flip(0), found, rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_simplex_projection_in_half_precision(dtype):
    plane = torch.randn(20, 5, 4).to(dtype)
    found = ext.project_simplex(plane)
    assert found.dtype == dtype
    exact = reference.project_simplex(plane.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=torch.finfo(dtype).eps)


def centroid(kernel):
    """Row and column of the centre of mass, relative to the kernel's centre."""
    kh, kw = kernel.shape[-2:]
    rows = torch.arange(kh, dtype=kernel.dtype) - kh // 2
    columns = torch.arange(kw, dtype=kernel.dtype) - kw // 2
    total = kernel.sum()
    return float((kernel.sum(-1) * rows).sum() / total), float(
        (kernel.sum(-2) * columns).sum() / total
    )


@settings(max_examples=80)
@given(st.integers(3, 9), st.integers(3, 9), seeds, st.data())
def test_recentering(blob_height, blob_width, seed, data):
    """A blob with room around it moves as a whole."""
    uniform = draws(seed)
    blob = uniform(blob_height, blob_width) ** 4 + 1e-6
    room = data.draw(st.tuples(*[st.integers(0, 4)] * 4))
    widest = (max(blob_height, blob_width), max(blob_height, blob_width))
    kernel = torch.nn.functional.pad(blob, (room[0], room[1], room[2], room[3]))
    # Enough room on every side for any shift.
    extra = max(kernel.shape)
    kernel = torch.nn.functional.pad(kernel, [extra] * 4)
    assert min(kernel.shape) > max(widest)
    moved = ext.recenter_kernel(kernel)
    assert moved.min() >= 0
    assert float(moved.sum()) == pytest.approx(float(kernel.sum()), rel=1e-12)
    assert centroid(moved) == pytest.approx((0, 0), abs=1e-10)
    torch.testing.assert_close(ext.recenter_kernel(moved), moved, rtol=0, atol=1e-10)
    torch.testing.assert_close(ext.recenter_kernel(3 * kernel), 3 * moved)
    # Whole pixels: values are only moved, and the centre is met to half a pixel.
    whole = ext.recenter_kernel(kernel, subpixel=False)
    assert torch.equal(whole.flatten().sort().values, kernel.flatten().sort().values)
    assert max(map(abs, centroid(whole))) <= 0.5 + 1e-12
    assert torch.equal(ext.recenter_kernel(whole, subpixel=False), whole) or any(
        abs(abs(c) - 0.5) < 1e-9 for c in centroid(whole)
    )


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), seeds, dtypes, st.booleans())
def test_recentering_without_room(height, width, seed, dtype, subpixel):
    """What leaves the frame is lost, yet the sum stays; what has no centre is left alone."""
    kernel = draws(seed, dtype)(height, width)
    moved = ext.recenter_kernel(kernel, subpixel=subpixel)
    assert moved.min() >= 0
    torch.testing.assert_close(moved.sum(), kernel.sum())
    odd = torch.stack([torch.zeros_like(kernel), torch.full_like(kernel, torch.nan)])
    torch.testing.assert_close(
        ext.recenter_kernel(odd, subpixel=subpixel), odd, rtol=0, atol=0, equal_nan=True
    )
