"""The first kernels of a varying blur: displacements, placement, and the whole search."""

import pytest
import torch
from em.test_blur_model import scene

import latentdem_ext as ext
from latentdem.evaluate_operators import turned
from latentdem.metrics import maximum_normalized_correlation, translate
from latentdem.operators.motion import random_motion_kernel
from latentdem.operators.varying import VaryingBlurModel
from latentdem.operators.varying_search import displacement, place, search_kernels, shift_kernel
from latentdem.priors.kernel import load_kernel_prior


def observe(kernels, grid, *, side=128, noise=0.005):
    """Kernels ``[1,P,k,k]`` on a grid: ``[1,3,side,side]``."""
    whole = side + kernels.shape[-1] - 1
    weights = ext.blend_windows(whole, whole, *grid, whole // max(grid) // 2)
    blurred = ext.varying_blur2d(scene(whole), kernels[0], weights, boundary="valid")
    return blurred + noise * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))


def centres(kernels):
    """Centres of mass ``[P,2]`` of ``kernels [1,P,k,k]``."""
    axis = torch.arange(kernels.shape[-1], dtype=torch.float32)
    total = kernels[0].sum((-2, -1))
    rows, columns = (kernels[0].sum(dim) @ axis / total for dim in (-1, -2))
    return torch.stack([rows, columns], -1)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.6, -1.3), (-2.5, 2.25), (3.0, -3.0)])
def test_displacement_finds_fractions(shift):
    still = scene(96).mean(1, keepdim=True)
    weight = torch.zeros_like(still)
    weight[..., 12:-12, 12:-12] = 1
    found, information = displacement(translate(still, *shift), still, weight)
    torch.testing.assert_close(found, torch.tensor(shift), atol=0.06, rtol=0)
    assert float(torch.linalg.eigvalsh(information).min()) > 0


def test_displacement_knows_what_it_cannot_know():
    stripes = (torch.arange(48) / 5).sin().expand(1, 1, 48, 48)
    moved, weight = stripes.roll(1, -1), torch.ones(1, 1, 48, 48)
    found, information = displacement(moved, stripes, weight)
    assert float(found[1]) == pytest.approx(1, abs=0.01)
    # Nothing changes from row to row.
    assert float(information[0, 0]) < 1e-6 * float(information[1, 1])
    flat = torch.full((1, 1, 48, 48), 0.5)
    found, information = displacement(flat, flat, weight)
    assert torch.isfinite(found).all() and float(information.abs().max()) < 1e-6


@pytest.mark.parametrize("shift", [(1.0, -2.0), (0.5, 0.25)])
def test_shift_kernel_moves_the_centre(shift):
    kernel = torch.nn.functional.pad(ext.gaussian_kernel(9, 1.2), (3, 3, 3, 3))
    moved = shift_kernel(kernel, torch.tensor(shift))
    assert float(moved.min()) >= 0 and float(moved.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(
        centres(moved) - centres(kernel), torch.tensor([shift]), atol=0.02, rtol=0
    )


def test_what_leaves_the_frame_does_not_come_back():
    kernel = torch.zeros(1, 1, 5, 5)
    kernel[..., 2, 0] = kernel[..., 2, 3] = 0.5
    moved = shift_kernel(kernel, torch.tensor([0.0, -1.0]))
    assert float(moved[..., 2, 2]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_place_mends_patches_that_were_torn_apart(grid):
    count = grid[0] * grid[1]
    # Room to be moved in.
    base = torch.nn.functional.pad(random_motion_kernel(9, seed=0), (2, 2, 2, 2))
    true = torch.cat([turned(base, float(angle)) for angle in torch.linspace(-20, 20, count)], 1)
    model = VaryingBlurModel(
        observe(true, grid, side=192), grid=grid, kernel_size=13, noise_std=0.005
    )
    moves = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [-1.0, -1.5]])[:count]
    torn = torch.cat(
        [shift_kernel(k[None, None], move) for k, move in zip(true[0], moves, strict=True)], 1
    )
    mended = place(model, torn)
    # All may move together; what counts is where they lie to each other.
    before, after = (centres(k) - centres(true) for k in (torn, mended))
    before, after = before - before.mean(0), after - after.mean(0)
    assert float(before.abs().max()) > 1.3
    # The picture between two patches is blurred by both: a fraction of a pixel is what can be had.
    assert float(after.abs().max()) < 0.8
    assert float(after.norm()) < 0.5 * float(before.norm())
    # And together they stay.
    assert float((centres(mended) - centres(torn)).mean(0).abs().max()) < 0.3


def test_place_leaves_what_nothing_is_known_of():
    kernels = torch.cat([random_motion_kernel(9, seed=seed) for seed in range(4)], 1)
    flat = torch.full((1, 3, 64, 64), 0.5)
    model = VaryingBlurModel(flat, grid=(2, 2), kernel_size=9, noise_std=0.01)
    torch.testing.assert_close(place(model, kernels), kernels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_search_finds_each_patch_its_own(boundary):
    true = torch.zeros(1, 2, 11, 11)
    true[0, 0, 5, 1:10] = true[0, 1, 1:10, 5] = 1 / 9
    model = VaryingBlurModel(
        observe(true, (1, 2), side=160),
        grid=(1, 2),
        kernel_size=11,
        noise_std=0.005,
        boundary=boundary,
        kernel_prior=load_kernel_prior(),
    )
    assert model.searches
    found = model.start_parameters()
    assert found.shape == (1, 2, 11, 11)
    assert torch.allclose(found.sum((-2, -1)), torch.ones(1, 2), atol=1e-4)
    for patch in range(2):
        own, other = (
            maximum_normalized_correlation(found[:, patch : patch + 1], true[:, p : p + 1])
            for p in (patch, 1 - patch)
        )
        assert own > 0.7 and own > 2 * other


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_search_on_pictures_without_content(grid):
    for observed in (torch.full((1, 3, 30, 36), 0.5), torch.zeros(1, 1, 30, 36)):
        model = VaryingBlurModel(
            observed, grid=grid, kernel_size=9, noise_std=0.01, kernel_prior=load_kernel_prior()
        )
        start = torch.full((1, 1, 9, 9), 1 / 81)
        found = search_kernels(model, start)
        assert torch.isfinite(found).all() and float(found.min()) >= 0
        assert torch.allclose(found.sum((-2, -1)), torch.ones(1, grid[0] * grid[1]), atol=1e-4)


def test_without_a_prior_all_patches_start_alike():
    model = VaryingBlurModel(torch.rand(1, 3, 40, 40), grid=(2, 2), kernel_size=9, noise_std=0.01)
    start = model.start_parameters()
    assert torch.equal(start, start[:, :1].expand(-1, 4, -1, -1))


def test_area_is_where_a_patch_weighs():
    model = VaryingBlurModel(torch.rand(1, 3, 64, 80), grid=(2, 2), kernel_size=9, noise_std=0.01)
    for least in (0.0, 0.15, 0.5):
        for patch, weight in enumerate(model.weights):
            inside = model.crop(weight) > least
            found = inside[model.area(patch, least)[2:]]
            # Nothing is left out, and no row or column is empty.
            assert int(inside.sum()) == int(found.sum())
            assert bool(found.any(0).all()) and bool(found.any(1).all())
