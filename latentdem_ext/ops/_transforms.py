"""What makes an operator work under ``torch.func`` and under autocast.

``torch.library.register_autograd`` serves ``backward()`` and ``torch.compile`` but not the
``torch.func`` transforms, which want a :class:`torch.autograd.Function` with a static
``setup_context``.  Both are made here from one pair of functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_functions: dict[Any, type[torch.autograd.Function]] = {}


def differentiable(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Register the derivative of ``latentdem::name`` for autograd and for ``torch.func``."""
    operator = getattr(torch.ops.latentdem, name).default
    torch.library.register_autograd(f"latentdem::{name}", backward, setup_context=setup_context)
    _functions[operator] = type(
        name,
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *inputs: operator(*inputs)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )


def call(operator: Any, *inputs: Any) -> Any:
    """``operator(*inputs)``, differentiable also inside ``torch.func`` transforms."""
    # Compiled graphs take the operator itself.
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
        return _functions[operator].apply(*inputs)
    return operator(*inputs)


def empty_in_format(image: Tensor, shape: Sequence[int]) -> Tensor:
    """``[...]`` like ``image``, channels last if that is dense in this format, else contiguous."""
    last = not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        shape,
        dtype=image.dtype,
        device=image.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def full_precision_under_autocast(*names: str) -> None:
    """Under autocast, compute in float32, as torch does for transforms and losses.

    A residual is a small difference of large numbers; half precision would keep its noise.
    """
    for name in names:
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"latentdem::{name}", device, torch.float32)


# vmap: the mapped dimension joins the batch ----------------------------------------------


def _front(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """``[V B|1, ...]`` of a tensor that may or may not be mapped and be shared in its batch.

    A tensor that is neither is kept as it is, ``[1,...]``.
    """
    if tensor is None or (dim is None and tensor.shape[0] == 1):
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.expand(size, batch, *mapped.shape[2:]).flatten(0, 1)


def _batch(tensor: Tensor, dim: int | None) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def join_batch(name: str, tensors: int) -> None:
    """Register vmap of an operator whose first ``tensors`` arguments carry a batch dimension."""

    def rule(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        batch = max(
            _batch(t, d) for t, d in zip(inputs[:tensors], dims, strict=False) if t is not None
        )
        flat = [_front(t, d, size, batch) for t, d in zip(inputs[:tensors], dims, strict=False)]
        # The first one decides the batch of the result, so it cannot stay shared.
        first = flat[0]
        assert first is not None
        if len(first) != size * batch:
            flat[0] = first.expand(size * batch, *first.shape[1:])
        output = getattr(torch.ops.latentdem, name)(*flat, *inputs[tensors:])
        return output.unflatten(0, (size, batch)), 0

    torch.library.register_vmap(f"latentdem::{name}", rule)


def join_batch_of_kernel_adjoint() -> None:
    """Register vmap of ``blur_conv2d_kernel``, whose result may be summed over the batch."""

    def rule(
        info: Any,
        dims: tuple[Any, ...],
        image: Tensor,
        residual: Tensor,
        boundary: str,
        kernel_size: list[int],
    ) -> tuple[Tensor, int]:
        size, batch = info.batch_size, _batch(image, dims[0])
        pair = [
            _front(t, d, size, batch).expand(size * batch, *t.shape[-3:])  # type: ignore[union-attr]
            for t, d in ((image, dims[0]), (residual, dims[1]))
        ]
        output = torch.ops.latentdem.blur_conv2d_kernel(
            *pair, boundary, [size * batch, *kernel_size[1:]]
        ).unflatten(0, (size, batch))
        return (output if kernel_size[0] == batch else output.sum(1, keepdim=True)), 0

    torch.library.register_vmap("latentdem::blur_conv2d_kernel", rule)


def join_leading(name: str) -> None:
    """Register vmap of an operator on ``[...,kh,kw]``, which takes any leading dimensions."""

    def rule(info: Any, dims: tuple[Any, ...], kernel: Tensor, *rest: Any) -> tuple[Any, Any]:
        return getattr(torch.ops.latentdem, name)(kernel.movedim(dims[0], 0), *rest), 0

    torch.library.register_vmap(f"latentdem::{name}", rule)
