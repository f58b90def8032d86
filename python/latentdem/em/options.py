"""Checks of the options of :func:`latentdem.deblur`, before there is an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

import latentdem_ext as ext
from latentdem.devices import AUTO, fastest_dtype, find_device, parse_dtype
from latentdem.em.e_step import COMPILE_MODES
from latentdem.em.settings import QUALITIES, PaperSettings, ProxSettings
from latentdem.io import InputError
from latentdem.operators.blur import BOUNDARIES

METHODS = ("prox", "paper")


def check_device(name: torch.device | str) -> torch.device:
    """The device called ``name``, if this machine and the native module have it.

    Raises:
        InputError: they don't; a line that says what to do.
    """
    try:
        device = find_device(name, "the operators run")
    except ValueError as error:
        raise InputError(str(error)) from None
    if device.type == "cuda" and not ext.build_info()["cuda"]:
        raise InputError(
            f"device '{name}' cannot be used: latentdem_ext was built without CUDA; build it "
            "beside a CUDA torch and its nvcc with LATENTDEM_CUDA=on"
        )
    return device


def placement(
    device: torch.device | str | None, dtype: torch.dtype | str | None, prior: torch.device
) -> tuple[torch.device, torch.dtype | None]:
    """Where networks compute, and in what: None as they are.

    Args:
        device: what was asked for; None: where the ``prior`` is.
        dtype: what was asked for; ``auto``: what is fastest there; None: float16 on a GPU that was
            asked for, else as they are.
        prior: where the prior is.

    Raises:
        ValueError: a device that is not here, or another number format.

    >>> placement("cpu", "bf16", torch.device("cpu"))
    (device(type='cpu'), torch.bfloat16)
    """
    place = prior if device is None else check_device(device)
    if dtype == AUTO:
        return place, fastest_dtype(place)
    found = parse_dtype(dtype)
    if found is None and device is not None and place.type == "cuda":
        found = torch.float16
    return place, found


def check_options(
    kernel_size: int, method: str, boundary: str, noise_std: float | None, tile: int | None
) -> None:
    """Check what can be checked of :func:`deblur`'s options before there is an image.

    Raises:
        InputError: an option that no image can be deblurred with.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, found '{method}'")
    if boundary not in BOUNDARIES:
        raise InputError(f"boundary must be one of {', '.join(BOUNDARIES)}, found '{boundary}'")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd and positive, found {kernel_size}")
    if noise_std is not None and not 0 < noise_std < 1:
        raise InputError(f"noise_std must lie between 0 and 1, found {noise_std}")
    if tile is not None and tile < 64:
        raise InputError(f"tile must be at least 64 pixels, or None, found {tile}")


def check_coding_noise(std: float | Sequence[float], count: int) -> list[float]:
    """The noise of lossy coding of each of ``count`` images.

    Raises:
        InputError: not one number, nor one for each, or not between 0 and 1.
    """
    each = [float(std)] * count if isinstance(std, int | float) else [float(s) for s in std]
    if len(each) != count:
        raise InputError(f"coding_noise_std must be one number or {count}, found {len(each)}")
    for one in each:
        if not 0 <= one < 1:
            raise InputError(f"coding_noise_std must lie between 0 and 1, found {one}")
    return each


def solver_settings(
    method: str,
    steps: int | None,
    settings: ProxSettings | PaperSettings | None = None,
    quality: str = "standard",
) -> ProxSettings | PaperSettings:
    """The settings of ``method``: those given, or its own of a ``quality``, with ``steps`` put in.

    Raises:
        ValueError: settings of the other method, steps that cannot be taken, or a quality that is
            unknown or has nothing to change.

    >>> solver_settings("prox", None, quality="fast").chains
    1
    """
    kind = ProxSettings if method == "prox" else PaperSettings
    if quality not in QUALITIES:
        raise InputError(f"quality must be one of {', '.join(QUALITIES)}, found '{quality}'")
    if QUALITIES[quality] and (settings is not None or kind is not ProxSettings):
        other = "settings" if settings is not None else "other method"
        raise InputError(f"quality '{quality}' is one of method 'prox': give no {other} with it")
    if settings is None and kind is ProxSettings:
        settings = ProxSettings(**QUALITIES[quality])
    if settings is None:
        settings = kind()
    if not isinstance(settings, kind):
        raise InputError(
            f"method '{method}' takes {kind.__name__}, found {type(settings).__name__}"
        )
    return settings if steps is None else replace(settings, steps=steps)


def check_compile(compile: str | None, method: str) -> None:
    """Refuse a mode that :func:`torch.compile` does not know, or a method that is not compiled.

    Raises:
        InputError: it is one of them.
    """
    if compile is not None and compile not in COMPILE_MODES:
        raise InputError(f"compile must be one of {', '.join(COMPILE_MODES)}, found '{compile}'")
    if compile is not None and method != "prox":
        raise InputError("only the E-step of method 'prox' is compiled")
