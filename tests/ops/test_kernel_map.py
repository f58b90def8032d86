"""The kernel estimate against exact dense solves, and what it promises to its users."""

import subprocess
import sys

import pytest
import torch

import latentdem_ext as ext
from latentdem_ext import reference

DOMAINS = ("image", "gradient")


def problem(batch=2, channels=2, size=(20, 18), kernel_size=(5, 4), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64)
    kernel = torch.rand(batch, 1, *kernel_size, generator=generator, dtype=torch.float64) ** 3
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    observation = reference.blur_conv2d(image, kernel)
    window = torch.rand(1, 1, *size, generator=generator, dtype=torch.float64)
    return (t.to(dtype) for t in (image, observation, kernel, window))


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("kernel_size", [(5, 4), (1, 1), (2, 7)])
def test_statistics(domain, windowed, kernel_size):
    image, observation, _, window = problem(kernel_size=kernel_size)
    options = {
        "domain": domain,
        "window": window if windowed else None,
        "image_variance": 0.01,
    }
    native = ext.kernel_map_statistics(image, observation, kernel_size, **options)
    plain = reference.kernel_map_statistics(image, observation, kernel_size, **options)
    for left, right in zip(native, plain, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 50.0])
def test_solver_reaches_the_dense_solution(alpha):
    image, observation, kernel, _ = problem()
    lags, rhs = ext.kernel_map_statistics(image, observation, (5, 4))
    start = torch.full_like(kernel, 1 / 20)[:, 0]
    found = ext.kernel_map_solve(lags, rhs, start, start, alpha=alpha, steps=80)
    exact = reference.kernel_map_solve(lags, rhs, start, start, alpha=alpha)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


def test_the_dense_solution_ends_after_threads_were_set():
    """In a process of its own, since what it guards against never returns."""
    program = """
import torch
from latentdem_ext import reference
torch.set_num_threads(2)
lags = torch.zeros(2, 29, 29, dtype=torch.float64)
lags[:, 14, 14] = 1
rhs = torch.rand(2, 15, 15, dtype=torch.float64)
found = reference.kernel_map_solve(lags, rhs, rhs, rhs, alpha=1.0)
torch.testing.assert_close(found, rhs)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("support_exact", [True, False])
@pytest.mark.parametrize("prior", ["none", "l1", "l2", "callable"])
@pytest.mark.parametrize("windowed", [False, True])
def test_update_matches_the_reference(domain, support_exact, prior, windowed):
    image, observation, kernel, window = problem()
    start = torch.full_like(kernel, 1 / 20)

    def shrink(k, strength):
        k = (k - 0.1 * strength).clamp_min(0)
        return k / k.sum((-2, -1), keepdim=True)

    options = {
        "noise_std": 0.02,
        "penalty": 1e5,
        "regularization": 800.0,
        "iterations": 4,
        "prior": shrink if prior == "callable" else prior,
        "domain": domain,
        "support_exact": support_exact,
        "window": window if windowed else None,
        "image_variance": 1e-3,
    }
    found = ext.kernel_map_update(image, observation, start, solver_steps=60, **options)
    exact = reference.kernel_map_update(image, observation, start, **options)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("domain", DOMAINS)
def test_recovers_the_kernel_in_float32(domain):
    image, observation, kernel, _ = problem(size=(64, 60), dtype=torch.float32)
    start = torch.full_like(kernel, 1 / 20)
    found = ext.kernel_map_update(
        image,
        observation,
        start,
        noise_std=0.01,
        penalty=1e3,
        regularization=0.0,
        iterations=10,
        prior="none",
        domain=domain,
    )
    assert (found - kernel).abs().max() < 2e-3
    assert found.min() >= 0
    torch.testing.assert_close(found.sum((-2, -1)), torch.ones(2, 1))


def test_support_exact_has_the_lower_residual():
    image, observation, _, _ = problem(kernel_size=(9, 9), size=(32, 32))
    start = torch.zeros(2, 1, 5, 5, dtype=torch.float64)  # smaller than the true kernel
    start[..., 2, 2] = 1
    residual = {}
    for exact in (True, False):
        found = ext.kernel_map_update(
            image,
            observation,
            start,
            noise_std=0.01,
            penalty=1e2,
            regularization=0.0,
            iterations=10,
            prior="none",
            support_exact=exact,
            solver_steps=40,
        )
        residual[exact] = ext.blur_data_term(image, found, observation).sum()
    assert residual[True] < residual[False]


def test_batch_mates_do_not_matter():
    image, observation, kernel, _ = problem(dtype=torch.float32)
    options = {
        "noise_std": 0.02,
        "penalty": 1e4,
        "regularization": 1.0,
        "iterations": 3,
    }
    start = torch.full_like(kernel, 1 / 20)
    together = ext.kernel_map_update(image, observation, start, **options)
    alone = ext.kernel_map_update(image[1:], observation[1:], start[1:], **options)
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)


def test_all_clamped_falls_back_to_the_last_kernel():
    image = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    start = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    start[..., 1, 1] = 1
    found = ext.kernel_map_update(
        image,
        -image,
        start,
        noise_std=0.01,
        penalty=1e-6,
        regularization=0.0,
        iterations=1,
        prior="none",
    )
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("domain", DOMAINS)
def test_opcheck(domain):
    image, observation, kernel, window = problem(dtype=torch.float32)
    ops = torch.ops.latentdem
    torch.library.opcheck(
        ops.kernel_map_statistics, (image, observation, window, [5, 4], domain, 0.1, None)
    )
    lags, rhs = ext.kernel_map_statistics(image, observation, (5, 4), domain=domain)
    torch.library.opcheck(ops.kernel_map_solve, (lags, rhs, kernel[:, 0], kernel[:, 0], 1.0, 3))
    for exact in (True, False):
        torch.library.opcheck(
            ops.kernel_map_update,
            (image, observation, kernel, None, 0.1, 1e3, 1.0, 2, "l1", domain, exact, 0.0, 3, None),
        )


SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (7, 7), (0, 1, 3, 3), (3, 33, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projections_match_the_reference(shape, dtype):
    plane = torch.randn(shape, dtype=torch.float64).to(dtype)
    kernel = plane.abs() + 0.01
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(
        ext.project_simplex(plane), reference.project_simplex(plane), **tolerance
    )
    for subpixel in (True, False):
        torch.testing.assert_close(
            ext.recenter_kernel(kernel, subpixel=subpixel),
            reference.recenter_kernel(kernel, subpixel=subpixel),
            **tolerance,
        )


def test_projection_properties():
    plane = torch.randn(50, 6, 7, dtype=torch.float64)
    projected = ext.project_simplex(plane)
    assert projected.min() >= 0
    torch.testing.assert_close(projected.sum((-2, -1)), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(ext.project_simplex(projected), projected)
    # Variational inequality: no point of the simplex is on the far side of the projection.
    other = torch.rand(50, 6, 7, dtype=torch.float64)
    other = other / other.sum((-2, -1), keepdim=True)
    assert ((plane - projected) * (other - projected)).sum((-2, -1)).max() <= 1e-12


def test_recentred_kernel_has_its_mass_in_the_centre():
    kernel = torch.zeros(1, 1, 15, 14, dtype=torch.float64)
    kernel[..., 4:7, 5:9] = torch.rand(3, 4, dtype=torch.float64)
    moved = ext.recenter_kernel(kernel)
    rows = torch.arange(15, dtype=torch.float64)
    columns = torch.arange(14, dtype=torch.float64)
    assert abs((moved.sum(-1) * rows).sum() / moved.sum() - 7) < 1e-9
    assert abs((moved.sum(-2) * columns).sum() / moved.sum() - 7) < 1e-9
    torch.testing.assert_close(moved.sum(), kernel.sum())


def test_projection_gradients():
    plane = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ext.project_simplex, (plane,))
    kernel = torch.rand(2, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ext.recenter_kernel, (kernel,))
    assert torch.autograd.gradgradcheck(ext.recenter_kernel, (kernel,))
    weight = torch.rand(2, 7, 6, dtype=torch.float64)  # needs no gradient of its own
    (first,) = torch.autograd.grad((ext.recenter_kernel(kernel) * weight).sum(), kernel,
                                   create_graph=True)  # fmt: skip
    assert first.requires_grad
    torch.library.opcheck(torch.ops.latentdem.project_simplex, (plane,))
    torch.library.opcheck(torch.ops.latentdem.recenter_kernel, (kernel.detach(), True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel": torch.rand(1, 1, 3, 3)}, r"kernel must have shape \[B,1,kh,kw\]"),
        ({"kernel": torch.rand(2, 1, 9, 3)}, "no larger than image"),
        ({"observation": torch.rand(2, 1, 8, 7)}, "observation must have the shape of image"),
        ({"noise_std": 0.0}, "noise_std must be positive"),
        ({"penalty": -1.0}, "penalty must be positive"),
        ({"regularization": -1.0}, "regularization must be finite and not negative"),
        ({"iterations": 0}, "iterations must be positive"),
        ({"prior": "tv"}, "prior must be none, l1, l2 or a callable, found 'tv'"),
        ({"domain": "wavelet"}, "domain must be image or gradient, found 'wavelet'"),
        ({"window": torch.rand(1, 1, 3, 3)}, "window must have shape"),
        ({"image_variance": -0.1}, "image_variance must be finite and not negative"),
        ({"solver_steps": 0}, "solver_steps must be positive"),
    ],
)
def test_bad_arguments(change, text):
    arguments = {
        "image": torch.rand(2, 1, 8, 8),
        "observation": torch.rand(2, 1, 8, 8),
        "kernel": torch.rand(2, 1, 3, 3),
        "noise_std": 0.1,
        "penalty": 1.0,
        "regularization": 1.0,
        "iterations": 1,
    } | change
    with pytest.raises(ValueError, match=text):
        ext.kernel_map_update(**arguments)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("domain", ["image", "gradient"])
@pytest.mark.parametrize("size", [(16, 20), (17, 13)])  # the second is transformed as it is
def test_a_prepared_observation_changes_nothing(size, domain, windowed):
    image, observation = torch.rand(2, 2, 3, *size)
    kernel = torch.rand(2, 1, 5, 4)
    window = torch.rand(1, 1, *size) if windowed else None
    options = {"domain": domain, "window": window}
    prepared = ext.kernel_map_prepare(observation, (5, 4), **options)
    settings = {"noise_std": 0.1, "penalty": 1e3, "regularization": 0.1, "iterations": 2} | options
    plain = ext.kernel_map_update(image, observation, kernel, **settings)
    quick = ext.kernel_map_update(image, observation, kernel, prepared=prepared, **settings)
    assert torch.equal(plain, quick)
    statistics = ext.kernel_map_statistics(image, observation, (5, 4), **options)
    again = ext.kernel_map_statistics(image, observation, (5, 4), prepared=prepared, **options)
    for left, right in zip(statistics, again, strict=True):
        assert torch.equal(left, right)


def test_prepared_for_something_else_is_refused():
    image = torch.rand(1, 1, 16, 16)
    prepared = ext.kernel_map_prepare(image, (3, 3))
    with pytest.raises(ValueError, match="prepared must come from kernel_map_prepare with this"):
        ext.kernel_map_statistics(image, image, (3, 3), domain="gradient", prepared=prepared)
    with pytest.raises(ValueError, match="prepared must come from"):
        ext.kernel_map_statistics(image.double(), image.double(), (3, 3), prepared=prepared)


@pytest.mark.parametrize("size", [(16, 20), (17, 13)])
def test_prepare_is_a_good_citizen(size):
    observation = torch.rand(2, 3, *size)
    torch.library.opcheck(
        torch.ops.latentdem.kernel_map_prepare.default, (observation, None, [5, 4], "gradient")
    )
