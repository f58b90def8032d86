"""Rules for ``torch.vmap``: the mapped dimension joins the batch, so one call does all the work.

Letters: V mapped size, B batch.  A rule names the tensors that carry a batch and says how each
of them joins; a tensor that it does not name is shared by the whole batch and cannot be mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Join = Callable[[Tensor, int | None, int, int], Tensor]
"""``(tensor, mapped dimension or none, V, B) -> [V B,...]``"""


def whole(tensor: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """``[B,...]``, mapped or not, to ``[V B,...]``."""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def each(tensor: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """``[B|1,...]``, mapped or not, to ``[V B,...]``."""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    if mapped.shape[1] == 1:
        mapped = mapped.expand(size, batch, *mapped.shape[2:])
    return mapped.flatten(0, 1)


def shared(tensor: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """``[B|1,...]`` to ``[V B,...]``, or as it is if it is neither mapped nor of each image."""
    return tensor if dim is None and tensor.shape[0] == 1 else each(tensor, dim, size, batch)


def ratio(tensor: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """The ratio of the Wiener step: ``[]``, ``[B]`` or ``[B|1,C|1,...]``."""
    rank = tensor.dim() - (dim is not None)
    if rank == 0:
        return tensor if dim is None else tensor.repeat_interleave(batch)
    return (whole if rank == 1 else shared)(tensor, dim, size, batch)


def _refuse(name: str, argument: str) -> None:
    raise ValueError(
        f"{argument} must not be mapped by vmap: {name} shares one among the whole batch; "
        "loop over it"
    )


def join_batch(name: str, summed: dict[int, str] | None = None, /, **joins: Join) -> None:
    """Register vmap of an operator.

    Args:
        name: of the operator.
        summed: outputs in the shape of an argument ``[B|1,...]``, summed over the images that
            share it, by position.
        joins: how each tensor that carries a batch joins; the first one is ``[B,...]``.
    """
    operator = getattr(torch.ops.latentdem, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    unknown = set(joins) - set(arguments)
    assert not unknown, f"{name} has no arguments {unknown}"
    first = next(iter(joins))

    def rule(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        given = dict(zip(arguments, zip(inputs, dims, strict=True), strict=True))

        def images(argument: str) -> int:
            tensor, dim = given[argument]
            return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]

        batch = images(first)
        flat = []
        for argument, (value, dim) in given.items():
            if argument in joins and value is not None:
                value = joins[argument](value, dim, size, batch)
            elif isinstance(value, Tensor) and dim is not None:
                _refuse(name, argument)
            flat.append(value)

        def part(output: Tensor, index: int) -> tuple[Tensor, int | None]:
            if output.shape == (0,) and size * batch != 0:  # a gradient that nobody asked for
                return output, None
            parts = output.unflatten(0, (size, batch))
            if summed and index in summed and images(summed[index]) != batch:
                parts = parts.sum(1, keepdim=True)
            return parts, 0

        found = operator(*flat)
        if isinstance(found, Tensor):
            return part(found, 0)
        parts = [part(output, i) for i, output in enumerate(found)]
        return tuple(output for output, _ in parts), tuple(dim for _, dim in parts)

    torch.library.register_vmap(f"latentdem::{name}", rule)


def join_batch_of_kernel_adjoint(name: str) -> None:
    """Register vmap of a blur's adjoint in the kernel, which may be summed over the batch.

    Its arguments are image and residual ``[B,...]``, perhaps weights, and at the end the size of
    the result ``[B|1,...]``.
    """
    operator = getattr(torch.ops.latentdem, name).default

    def rule(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        for argument, dim in zip(operator._schema.arguments[2:], dims[2:], strict=True):
            if dim is not None and not isinstance(dim, (list, tuple)):
                _refuse(name, argument.name)
        image, residual = (whole(inputs[i], dims[i], size, 0) for i in (0, 1))
        batch = image.shape[0] // max(size, 1)
        kernel_size = inputs[-1]
        output = operator(image, residual, *inputs[2:-1], [size * batch, *kernel_size[1:]])
        output = output.unflatten(0, (size, batch))
        return (output if kernel_size[0] == batch else output.sum(1, keepdim=True)), 0

    torch.library.register_vmap(f"latentdem::{name}", rule)


def join_views() -> None:
    """Register vmap of ``volume_render`` and its backward over cameras; they share one grid.

    Each mapped set of cameras has a gradient of its own in the grid, so the backward pass takes
    them one by one if that is asked for.
    """
    cameras = {"camera_to_world": whole, "intrinsics": whole}
    join_batch("volume_render", **cameras)
    operator = torch.ops.latentdem.volume_render_backward.default
    names = [argument.name for argument in operator._schema.arguments]
    mappable = {"grad_color", "grad_opacity", "grad_depth", *cameras}

    def rule(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        given = dict(zip(names, zip(inputs, dims, strict=True), strict=True))
        for name, (value, dim) in given.items():
            if isinstance(value, Tensor) and dim is not None and name not in mappable:
                _refuse("volume_render", name)
        grid = given["need_density"][0] or given["need_color"][0]

        def joined(index: int | None) -> list[Any]:
            return [
                value
                if name not in mappable
                else whole(value, dim, size, 0)
                if index is None
                else value
                if dim is None
                else value.select(dim, index)
                for name, (value, dim) in given.items()
            ]

        if grid:
            found = zip(*(operator(*joined(index)) for index in range(size)), strict=True)
            return tuple(torch.stack(parts) for parts in found), (0,) * 4
        density, color, *parts = operator(*joined(None))
        split = [part.unflatten(0, (size, -1)) for part in parts]
        return (density, color, *split), (None, None, 0, 0)

    torch.library.register_vmap("latentdem::volume_render_backward", rule)


def join_leading(name: str) -> None:
    """Register vmap of an operator on ``[...,kh,kw]``, which takes any leading dimensions."""

    def rule(info: Any, dims: tuple[Any, ...], kernel: Tensor, *rest: Any) -> tuple[Any, Any]:
        return getattr(torch.ops.latentdem, name)(kernel.movedim(dims[0], 0), *rest), 0

    torch.library.register_vmap(f"latentdem::{name}", rule)
