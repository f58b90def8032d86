import pytest
import torch

from latentdem.metrics import aligned_psnr, maximum_normalized_correlation, psnr, translate
from latentdem.operators.motion import random_motion_kernel
from latentdem.training.data import gradient_ratio


def test_mnc_bounds_and_shift_invariance():
    kernel = random_motion_kernel(15, seed=0)
    assert maximum_normalized_correlation(kernel, kernel) == pytest.approx(1)
    assert maximum_normalized_correlation(kernel.roll((1, -1), (-2, -1)), kernel) > 0.97
    other = random_motion_kernel(21, seed=5)
    assert 0 < float(maximum_normalized_correlation(kernel, other)) < 0.95
    delta = torch.zeros(1, 1, 15, 15)
    delta[..., 7, 7] = 1
    assert float(maximum_normalized_correlation(delta, kernel)) < 0.6


@pytest.mark.parametrize("shift", [(0, 0), (2, -3), (0.5, 0.25)])
def test_aligned_psnr_finds_the_shift(shift):
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), 64, mode="bicubic")
    moved = translate(smooth, *shift)
    value, found = aligned_psnr(moved, smooth, margin=5, search=4)
    assert found == (-shift[0], -shift[1])
    assert value > 38
    if shift != (0, 0):
        assert float(psnr(moved, smooth)) < value - 3


def test_aligned_psnr_needs_room():
    with pytest.raises(ValueError, match="too small for an inset"):
        aligned_psnr(torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 20), margin=8, search=2)


def test_motion_kernels_are_kernels():
    for seed in range(20):
        kernel = random_motion_kernel(25, seed=seed)
        assert kernel.min() >= 0
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
        assert float(kernel.max()) < 0.4  # a blur, not a delta
    assert torch.equal(random_motion_kernel(25, seed=3), random_motion_kernel(25, seed=3))
    with pytest.raises(ValueError, match="size must be at least 3"):
        random_motion_kernel(1, seed=0)


def test_gradient_ratio_tells_sharp_from_soft():
    sharp = torch.rand(1, 1, 64, 64)
    soft = torch.nn.functional.interpolate(sharp, 256, mode="bicubic")
    assert gradient_ratio(sharp[0].permute(1, 2, 0).numpy()) > 0.45
    assert gradient_ratio(soft[0].permute(1, 2, 0).numpy()) < 0.45
