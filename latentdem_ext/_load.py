"""Loads the native module, and explains in one message what to do if that fails."""

from __future__ import annotations

from typing import Any

import torch


def _release(version: str) -> str:
    return version.split("+")[0]


def load() -> Any:
    """Import ``latentdem_ext._C``; raise ``ImportError`` with the remedy otherwise."""
    remedy = "rebuild it for this torch: pip install --no-build-isolation -e . (or: make build)"
    try:
        from latentdem_ext import _C
    except ImportError as error:
        raise ImportError(
            f"latentdem_ext: the native module cannot be loaded ({error}); {remedy}"
        ) from error
    built = _C.build_info()["torch"]
    if _release(built) != _release(torch.__version__):
        raise ImportError(
            f"latentdem_ext was built for torch {built}, but torch {torch.__version__} is "
            f"installed; {remedy}"
        )
    return _C
