"""The CUDA path of the blur operators, emulated, against the plain torch reference."""

import pytest
import torch
from ops.samples import BOUNDARIES, SAMPLES

from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

all_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


@all_samples
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward(emulated, sample, boundary, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    assert_accurate(
        lambda x, k: emulated.blur_conv2d(x, k, boundary),
        lambda x, k: reference.blur_conv2d(x, k, boundary=boundary),
        image,
        kernel,
        slack=32,
    )
