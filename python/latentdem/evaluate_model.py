"""What a suite restores with: the packaged prior on the CPU, or your own where you like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from latentdem.devices import dtype_name
from latentdem.em.options import placement
from latentdem.priors import LatentPrior, load_prior
from latentdem.priors.packaged import prior_digests


@dataclass(frozen=True)
class ModelUnderTest:
    """The prior of photographs that a suite measures.

    Args:
        prior: in its place and number format; None: the packaged one, on the CPU.

    >>> ModelUnderTest.load().options()
    {}
    >>> ModelUnderTest.load(dtype="bf16").setup()["dtype"]
    'bfloat16'
    """

    prior: LatentPrior | None = None

    @classmethod
    def load(
        cls, source: str | None = None, device: str = "cpu", dtype: str | None = None
    ) -> ModelUnderTest:
        """The prior of ``source``, as :func:`latentdem.load_prior` takes it, on ``device``.

        Args:
            source: a file, a folder or a hub id; None: the packaged one.
            device: ``cpu``, ``cuda``, ``cuda:1`` ...
            dtype: of the networks; None: float16 on CUDA, else as they are.

        Raises:
            FileNotFoundError: no such prior.
            ValueError: it cannot be used, or not there.
        """
        place, number_format = placement(device, dtype, torch.device("cpu"))
        if source is None and place.type == "cpu" and number_format is None:
            return cls()
        return cls(load_prior(source).to(place, number_format))

    def options(self) -> dict[str, Any]:
        """Of :func:`latentdem.deblur`, which computes where the prior is."""
        return {} if self.prior is None else {"prior": self.prior}

    def loaded(self) -> LatentPrior:
        """The prior, the packaged one if there is no other."""
        return load_prior() if self.prior is None else self.prior

    def setup(self) -> dict[str, Any]:
        """What results depend on, for their file; of the packaged prior what it always was."""
        if self.prior is None:
            return {"priors": prior_digests()}
        return {
            "priors": prior_digests(),
            "prior": {"name": self.prior.name, "sha256": self.prior.digests()},
            "device": device_name(self.prior.device),
            "dtype": dtype_name(self.prior.dtype),
        }


def device_name(device: torch.device) -> str:
    """What figures of time belong to: ``cpu``, or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
