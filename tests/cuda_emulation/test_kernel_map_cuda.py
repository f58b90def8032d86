"""The CUDA path of the kernel estimate, emulated, against the plain torch reference."""

from functools import cache

import pytest
import torch
from ops.samples import SAMPLES

import latentdem_ext as ext
from latentdem_ext import reference

# (domain, windows)
SETTINGS = [("image", 0), ("gradient", 0), ("image", 1), ("gradient", 2)]
DTYPES = [torch.float32, torch.float64]

all_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
all_settings = pytest.mark.parametrize(("domain", "windows"), SETTINGS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@cache
def problem(image_size, kernel_size, windows=0, dtype=torch.float64):
    """Image, blurred image, start and window (none, shared or one an image)."""
    generator = torch.Generator().manual_seed(sum(kernel_size))
    image = torch.rand(image_size, generator=generator, dtype=torch.float64)
    kernel = torch.rand(image_size[0], 1, *kernel_size, generator=generator, dtype=torch.float64)
    kernel = kernel**3 / (kernel**3).sum((-2, -1), keepdim=True)
    observation = reference.blur_conv2d(image, kernel)
    start = torch.full_like(kernel, 1 / kernel[0].numel())
    window = None
    if windows > 0:
        count = 1 if windows == 1 else image_size[0]
        window = torch.rand(count, 1, *image_size[2:], generator=generator).to(dtype)
    return image.to(dtype), observation.to(dtype), start.to(dtype), window


def options_of(image, window, domain):
    return {"domain": domain, "window": window, "image_variance": 1e-3}


def settings_of(image, iterations=2):
    """So much weight for the last iterate that few steps reach the dense solution."""
    alpha = float(image.double().square().sum((1, 2, 3)).max())
    return {
        "noise_std": 0.02,
        "penalty": alpha / 0.02**2,
        "regularization": 0.01 * alpha / 0.02**2 / 25,
        "iterations": iterations,
    }


@cache
def expected_statistics(image_size, kernel_size, domain, windows, dtype):
    image, observation, _, window = problem(image_size, kernel_size, windows, dtype)
    double = [None if t is None else t.double() for t in (image, observation, window)]
    options = options_of(image, double[2], domain)
    return reference.kernel_map_statistics(*double[:2], kernel_size, **options)


@cache
def expected_update(image_size, kernel_size, domain, windows, dtype, prior, support_exact):
    """In float64, and as plain torch computes it in `dtype`."""
    tensors = problem(image_size, kernel_size, windows, dtype)
    results = []
    for kind in (torch.float64, dtype):
        image, observation, start, window = (None if t is None else t.to(kind) for t in tensors)
        result = reference.kernel_map_update(
            image, observation, start, prior=prior, support_exact=support_exact,
            **settings_of(image), **options_of(image, window, domain),
        )  # fmt: skip
        results.append(result)
    return results


def update(ops, image, observation, start, *, window=None, domain="image", prior="l1",
           support_exact=True, image_variance=0.0, solver_steps=6, prepared=None,
           **settings):  # fmt: skip
    return ops.kernel_map_update(
        image, observation, start, window, settings["noise_std"], settings["penalty"],
        settings["regularization"], settings["iterations"], prior, domain, support_exact,
        image_variance, solver_steps, prepared,
    )  # fmt: skip


def assert_near(found, exact, plain, units=64):
    """The error is at most twice that of plain torch, but for some units of machine epsilon."""
    assert found.shape == exact.shape
    allowed = units * torch.finfo(found.dtype).eps * float(exact.abs().max())
    allowed += 2 * float((plain.double() - exact).abs().max())
    assert float((found.double() - exact).abs().max()) <= allowed


@all_samples
@all_settings
@both_dtypes
def test_statistics(emulated, sample, domain, windows, dtype):
    sizes = sample.image, sample.kernel[2:]
    image, observation, _, window = problem(*sizes, windows, dtype)
    found = emulated.kernel_map_statistics(image, observation, window, sizes[1], domain, 1e-3, None)
    exact = expected_statistics(*sizes, domain, windows, dtype)
    scale = float(exact[0].abs().max())
    for left, right in zip(found, exact, strict=True):
        assert left.dtype == dtype
        assert float((left.double() - right).abs().max()) <= 32 * torch.finfo(dtype).eps * scale


@all_samples
@pytest.mark.parametrize("prior", ["none", "l1", "l2"])
@both_dtypes
def test_update(emulated, sample, prior, dtype):
    sizes = sample.image, sample.kernel[2:]
    domain, windows = SETTINGS[(SAMPLES.index(sample) + len(prior)) % 4]
    image, observation, start, window = problem(*sizes, windows, dtype)
    steps = 12 if dtype == torch.float32 else 30
    found = update(
        emulated, image, observation, start, prior=prior, solver_steps=steps,
        **settings_of(image), **options_of(image, window, domain),
    )  # fmt: skip
    expected = expected_update(*sizes, domain, windows, dtype, prior, True)
    assert_near(found, *expected, 64 if dtype == torch.float32 else 4096)


@all_samples
@pytest.mark.parametrize("prior", ["none", "l1", "l2"])
@both_dtypes
def test_update_on_the_full_grid(emulated, sample, prior, dtype):
    sizes = sample.image, sample.kernel[2:]
    domain, windows = SETTINGS[(SAMPLES.index(sample) + len(prior)) % 4]
    image, observation, start, window = problem(*sizes, windows, dtype)
    found = update(
        emulated, image, observation, start, prior=prior, support_exact=False,
        **settings_of(image), **options_of(image, window, domain),
    )  # fmt: skip
    assert_near(found, *expected_update(*sizes, domain, windows, dtype, prior, False))


# The largest kernels whose loop fits into a block's memory altogether; but for two vectors; one
# that does not fit; and narrow ones.
LARGE = [
    ((72, 72), torch.float32), ((50, 50), torch.float64), ((78, 78), torch.float32),
    ((54, 54), torch.float64), ((81, 75), torch.float32), ((81, 75), torch.float64),
    ((1, 700), torch.float32), ((110, 9), torch.float64), ((2, 1), torch.float64),
]  # fmt: skip


@pytest.mark.parametrize(("size", "dtype"), LARGE, ids=str)
def test_large_kernels_match_the_cpu(emulated, size, dtype):
    image_size = (1, 1, max(size[0] + 3, 12), max(size[1] + 2, 12))
    image, observation, start, _ = problem(image_size, size, 0, dtype)
    settings = settings_of(image, iterations=1)
    lags, rhs = ext.kernel_map_statistics(image.double(), observation.double(), size)
    alpha = settings["noise_std"] ** 2 * settings["penalty"]
    arguments = [start[:, 0], start[:, 0]]
    options = {"alpha": alpha, "steps": 2}
    exact = ext.kernel_map_solve(lags, rhs, *(t.double() for t in arguments), **options)
    found = emulated.kernel_map_solve(lags.to(dtype), rhs.to(dtype), *arguments, alpha, 2)
    # b and A k nearly cancel; what is left of their rounding is relative to the kernel's sum, one.
    assert float((found.double() - exact).abs().max()) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [(9, 7), (52, 51), (90, 90)])
def test_iterations_match_the_cpu(emulated, size):
    """On each path; so few steps that the solver's own path shows."""
    sizes = (2, 1, size[0] + 6, size[1] + 8), size
    image, observation, start, _ = problem(*sizes)
    settings = settings_of(image, iterations=3) | {"penalty": 1e4, "regularization": 2.0}
    found = update(emulated, image, observation, start, solver_steps=3, **settings)
    exact = ext.kernel_map_update(image, observation, start, solver_steps=3, **settings)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-11)


@both_dtypes
@pytest.mark.parametrize("support_exact", [True, False])
def test_batch_mates_do_not_matter(emulated, support_exact, dtype):
    image, observation, start, window = problem((3, 2, 20, 18), (5, 4), 2, dtype)
    options = settings_of(image) | {"support_exact": support_exact}
    together = update(emulated, image, observation, start, window=window, **options)
    alone = update(
        emulated, image[1:2], observation[1:2], start[1:2], window=window[1:2], **options
    )
    # To the bit, but for the host's transforms of images, which depend on their number.
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-7)
    lags, rhs = emulated.kernel_map_statistics(
        image, observation, window, [5, 4], "image", 0.0, None
    )
    solve = [lags, rhs, start[:, 0], start[:, 0]]
    every = emulated.kernel_map_solve(*solve, 10.0, 3)
    one = emulated.kernel_map_solve(*(t[1:2] for t in solve), 10.0, 3)
    assert torch.equal(every[1:2], one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(emulated, dtype):
    image, observation, start, _ = problem((2, 3, 20, 18), (5, 4), 0, torch.float32)
    x, y = image.to(dtype), observation.to(dtype)
    options = settings_of(image)
    found = update(emulated, x, y, start, **options)
    exact = update(emulated, x.float(), y.float(), start, **options)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)
    assert update(emulated, x, y, start.to(dtype), **options).dtype == dtype


@pytest.mark.parametrize("size", [(16, 20), (17, 13)])
@all_settings
def test_a_prepared_observation_changes_nothing(emulated, size, domain, windows):
    image, observation, start, window = problem((2, 3, *size), (5, 4), windows, torch.float32)
    prepared = emulated.kernel_map_prepare(observation, window, [5, 4], domain)
    options = settings_of(image) | {"domain": domain, "window": window}
    plain = update(emulated, image, observation, start, **options)
    quick = update(emulated, image, observation, start, prepared=prepared, **options)
    assert torch.equal(plain, quick)
    with pytest.raises(ValueError, match="prepared must come from kernel_map_prepare with this"):
        update(emulated, image.double(), observation, start.double(), prepared=prepared, **options)


def test_what_is_not_finite_stays_visible(emulated):
    image, observation, start, _ = problem((2, 1, 20, 18), (5, 4))
    broken = image.clone()
    broken[0, 0, 3, 3] = torch.inf
    found = update(emulated, broken, observation, start, **settings_of(image))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_all_clamped_falls_back_to_the_last_kernel(emulated):
    image = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    start = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    options = {"noise_std": 0.01, "penalty": 1e-6, "regularization": 0.0, "iterations": 1}
    assert torch.equal(update(emulated, image, -image, start, **options), start)
    # The prior, too: nothing exceeds its threshold, so that the next start is the estimate.
    image, observation, start, _ = problem((2, 1, 20, 18), (5, 4))
    options = settings_of(image) | {"regularization": 1e9}
    for support_exact in (True, False):
        expected = ext.kernel_map_update(
            image, observation, start, support_exact=support_exact, **options
        )
        found = update(emulated, image, observation, start, support_exact=support_exact, **options)
        torch.testing.assert_close(found, expected)


def test_empty_batch(emulated):
    image, start = torch.rand(0, 3, 8, 9), torch.rand(0, 1, 3, 3)
    options = {"noise_std": 0.1, "penalty": 1.0, "regularization": 0.0, "iterations": 1}
    assert update(emulated, image, image, start, **options).shape == start.shape
    lags, rhs = emulated.kernel_map_statistics(image, image, None, [3, 3], "image", 0.0, None)
    assert lags.shape == (0, 5, 5)
    assert rhs.shape == (0, 3, 3)
    assert emulated.kernel_map_solve(lags, rhs, rhs, rhs, 1.0, 2).shape == rhs.shape
    assert emulated.kernel_map_prepare(image, None, [3, 3], "gradient").shape[:2] == (0, 6)


PLANES = [(1, 1, 1, 1), (2, 3, 5, 4), (7, 7), (0, 1, 3, 3), (3, 33, 2), (2, 40, 41)]


@pytest.mark.parametrize("shape", PLANES, ids=str)
@both_dtypes
def test_projections(emulated, shape, dtype):
    plane = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plane = plane.to(dtype)
    kernel = plane.abs() + 0.01
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    for scale in (1.0, 1e-3, 1e6):
        torch.testing.assert_close(
            emulated.project_simplex(scale * plane),
            reference.project_simplex(scale * plane),
            **tolerance,
        )
    for subpixel in (True, False):
        torch.testing.assert_close(
            emulated.recenter_kernel(kernel, subpixel),
            reference.recenter_kernel(kernel, subpixel=subpixel),
            **tolerance,
        )


def test_projections_of_what_is_no_kernel(emulated):
    plane = torch.rand(3, 4, 5, dtype=torch.float64)
    plane[1, 2, 2] = torch.nan
    plane[2, 0, 0] = torch.inf
    projected = emulated.project_simplex(plane)
    assert projected[1:].isnan().all()
    torch.testing.assert_close(projected[0], reference.project_simplex(plane[0]))
    zero = torch.zeros(2, 4, 5, dtype=torch.float64)
    assert torch.equal(emulated.recenter_kernel(zero, True), zero)
    # Many ties, and a geometric series, for which the search for the threshold is longest.
    for values in (torch.ones(6, 6), -(1.5 ** torch.arange(-30.0, 34.0)).reshape(8, 8)):
        torch.testing.assert_close(
            emulated.project_simplex(values.double()), reference.project_simplex(values.double())
        )


def test_bad_arguments(emulated):
    image, start = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 3, 3)
    options = {"noise_std": 0.1, "penalty": 1.0, "regularization": 0.0, "iterations": 1}
    with pytest.raises(ValueError, match="noise_std must be positive"):
        update(emulated, image, image, start, **(options | {"noise_std": 0.0}))
    with pytest.raises(ValueError, match="prior must be none, l1, l2 or a callable, found 'tv'"):
        update(emulated, image, image, start, prior="tv", **options)
    with pytest.raises(ValueError, match=r"autocorrelation must have shape \[B,2kh-1,2kw-1\]"):
        emulated.kernel_map_solve(start[:, 0], start[:, 0], start[:, 0], start[:, 0], 1.0, 2)
