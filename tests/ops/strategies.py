"""Hypothesis strategies that the operators' property tests share."""

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])


def draws(seed, dtype=torch.float64):
    """``uniform(*shape)`` in [0, 1), the same for the same seed in every precision."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    return uniform


def on_simplex(kernel):
    """Planes divided by their sums."""
    return kernel / kernel.sum((-2, -1), keepdim=True)


@st.composite
def sizes(draw, high, kernel=None):
    """``(H, W, kh, kw)``, the kernel no larger than the image, one pixel and even sides too."""
    height, width = draw(st.integers(1, high)), draw(st.integers(1, high))
    limit = high if kernel is None else kernel
    kh = draw(st.integers(1, min(height, limit)))
    return height, width, kh, draw(st.integers(1, min(width, limit)))


def matrix_of(linear, *shape):
    """Dense matrix of a linear map on tensors of ``shape``, column by column, float64."""
    count = torch.Size(shape).numel()
    basis = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    return torch.stack([linear(b).flatten() for b in basis], 1)
