"""A second device without a GPU: tensors that say ``meta`` and are kept, and computed, on the CPU.

Code that leaves a tensor on the CPU, or makes one there, fails here as it would with a GPU, and
what it computes on the device is the CPU's result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_TAKES_INDICES_OF_THE_CPU = ("index", "index_put", "index_put_", "_index_put_impl_")
_RESOLVED = {"_conj": torch.ops.aten.conj_physical.default, "_neg_view": torch.ops.aten.neg.default}
_COPIES = ("copy_", "_to_copy")


class Placed(Tensor):
    """A tensor on the stand-in."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Placed":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """torch's own does not take subclasses."""
        return self.inner.tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"Placed({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Hears of what is made on the device, beside what is computed there."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Uploads(TorchFunctionMode):
    """What is made of Python's numbers is made on the CPU first: torch would keep no values."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            return made if device is None else made.to(device)
        if function is Tensor.new_tensor and isinstance(args[0], Placed):
            kwargs.setdefault("dtype", args[0].dtype)
            return torch.tensor(*args[1:], **kwargs).to(DEVICE)
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            made_here = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], made_here, *args[2:])
        return function(*args, **kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function.name().removeprefix("aten::").split(".")[0]
    flat = tree_flatten((args, kwargs))[0]
    placed = [value for value in flat if isinstance(value, Placed)]
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    there = asked.type == DEVICE.type if asked is not None else bool(placed)
    if name == "_fused_sdp_choice" and placed:
        return 0  # the plain way: the CPU's own is not asked for on another device
    if placed and name not in _COPIES:
        _check(name, args, flat)
    # Marks that are resolved above this place would be lost beneath it.
    function = _RESOLVED.get(name, function) if placed else function
    inner = tree_map(lambda v: v.inner if isinstance(v, Placed) else v, (args, kwargs))
    found = function(*inner[0], **inner[1])
    if name == "copy_":
        return args[0]
    if name == "_local_scalar_dense" or not (there or placed):
        return found
    if not there and asked is not None:
        return found
    return _wrapped(function, found, args, kwargs)


def _check(name: str, args: Any, flat: list[Any]) -> None:
    others = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, Placed) and v.dim()]
    if name in _TAKES_INDICES_OF_THE_CPU and isinstance(args[0], Placed):
        values = args[2] if len(args) > 2 else None
        stray = isinstance(values, Tensor) and not isinstance(values, Placed) and values.dim()
        others = [values] if stray else []
    if others:
        shapes = ", ".join(str(list(value.shape)) for value in others)
        raise RuntimeError(f"{name}: tensors of the CPU beside those of the device: {shapes}")


def _wrapped(function: Any, found: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Results on the device; what was written in place is the argument itself."""
    given = zip(function._schema.arguments, args)
    named = ((a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs)
    written = {
        id(value.inner): value
        for argument, value in (*given, *named)
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and isinstance(value, Placed)
    }

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Placed):
            return value
        return written[id(value)] if id(value) in written else Placed(value)

    return tree_map(wrap, found)


@contextmanager
def stand_in_device() -> Iterator[torch.device]:
    """Within it, ``meta`` is a device like a GPU."""
    real = torch.autocast

    def autocast(kind: str, **options: Any) -> Any:
        return real("cpu" if kind == DEVICE.type else kind, **options)

    with mock.patch("torch.autocast", autocast), _Mode(), _Uploads():
        yield DEVICE
