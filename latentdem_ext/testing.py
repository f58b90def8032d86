"""Checks for operators, for this project's tests and for yours.

* :func:`assert_accurate`: the error against float64 is at most twice that of plain torch in
  the same dtype (plus a few units in the last place, where plain torch happens to be exact).
* :func:`assert_adjoint`: ``<A x, r> = <x, A' r>``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_accurate(
    native: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    slack: float = 8.0,
    cancelled: float = 0.0,
) -> None:
    """Compare ``native(*inputs)`` with the float64 reference under the two-times rule.

    Args:
        native: operator under test.
        reference: the same function in plain torch.
        inputs: tensors of one dtype.
        slack: extra allowance in units of machine epsilon times the result's largest value.
        cancelled: size of what cancels in the result; it is allowed one machine epsilon of that.

    Raises:
        AssertionError: with both errors and the bound.
    """
    exact = reference(*(t.double() for t in inputs))
    dtype = inputs[0].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    plain = reference(*(t.float() for t in inputs)).to(dtype) if half else reference(*inputs)
    result = native(*inputs)
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    scale = float(exact.abs().max())
    error = float((result.double() - exact).abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max())
    if dtype == torch.float64:
        slack = 2 * slack  # here the reference is rounded, too
    allowed += torch.finfo(dtype).eps * (slack * max(scale, 1e-30) + cancelled)
    assert error <= allowed, f"error {error:.3e} against float64, allowed {allowed:.3e}"


def assert_adjoint(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    domain: Tensor,
    *,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> None:
    """Check ``<forward(x), r> = <x, adjoint(r)>`` to ``tolerance``, relative.

    Args:
        forward: linear operator.
        adjoint: its claimed adjoint.
        domain: a tensor of the domain's shape and dtype (its values are not used).
        tolerance: bound on the difference over ``||forward(x)|| ||r||``.
        seed: seed of the two random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(domain.shape, generator=generator, dtype=torch.float64).to(domain)
    image = forward(x)
    r = torch.randn(image.shape, generator=generator, dtype=torch.float64).to(image)
    left = (image.double() * r.double()).sum()
    right = (x.double() * adjoint(r).double()).sum()
    scale = float(image.double().norm() * r.double().norm()) or 1.0
    gap = abs(float(left - right)) / scale
    assert gap <= tolerance, f"<Ax,r> and <x,A'r> differ by {gap:.2e} relative"
