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
    # Graphs that Dynamo writes take the operator itself; a backward that is traced afterwards runs
    # here as it would without a compiler.
    if not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack():
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
