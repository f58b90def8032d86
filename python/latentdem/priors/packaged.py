"""The packaged files that a deblurring depends on."""

from __future__ import annotations

from pathlib import Path

from latentdem.io import file_digest
from latentdem.priors import kernel, latent, sharpness


def packaged_files() -> list[Path]:
    """The files of ``latentdem.deblur``'s networks."""
    return [latent.PACKAGED, kernel.PACKAGED, sharpness.PACKAGED]


def prior_digests() -> dict[str, str]:
    """SHA-256 of both priors by their names, for the setup of stored results.

    Not of the sharpness classifier: what it leaves as it is shows in the results, as no blur.
    """
    return {path.name: file_digest(path) for path in (latent.PACKAGED, kernel.PACKAGED)}
