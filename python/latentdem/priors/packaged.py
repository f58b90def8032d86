"""The packaged files that a deblurring depends on."""

from __future__ import annotations

from pathlib import Path

from latentdem.io import file_digest
from latentdem.priors import finishing, kernel, latent, sharpness


def packaged_files(method: str = "prox") -> list[Path]:
    """The files of ``latentdem.deblur``'s networks; ``paper`` has no finishing network."""
    files = [latent.PACKAGED, kernel.PACKAGED, sharpness.PACKAGED]
    return [*files, finishing.PACKAGED] if method == "prox" else files


def packaged_digests(method: str = "prox") -> dict[str, str]:
    """SHA-256 of each by its name, for the setup of stored results."""
    return {path.name: file_digest(path) for path in packaged_files(method)}
