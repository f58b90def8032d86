"""The priors that the page works with, loaded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from latentdem.devices import AUTO, dtype_name
from latentdem.em.options import placement
from latentdem.priors import LatentPrior, load_prior
from latentdem.priors.objects import ObjectsPrior, load_objects_prior


@dataclass(frozen=True)
class Models:
    """What restores and reconstructs.

    Args:
        photographs: prior in its place and number format; None: the packaged one, on the CPU.
        objects: the same of objects.
        packaged_objects: whether that is the packaged one, wherever it computes.
    """

    photographs: LatentPrior | None = None
    objects: ObjectsPrior | None = None
    packaged_objects: bool = True

    @classmethod
    def load(
        cls,
        photographs: str | None = None,
        objects: str | None = None,
        *,
        device: str = "cpu",
        dtype: str | None = None,
    ) -> Models:
        """Priors on a device, before the page is shown.

        Args:
            photographs: as :func:`latentdem.load_prior` takes it; None: the packaged one.
            objects: as :func:`latentdem.priors.objects.load_objects_prior` takes it.
            device: ``cpu``, ``cuda``, ``cuda:1`` ...
            dtype: of the networks; None: float16 on CUDA, else as they are.  ``auto`` takes what
                is fastest of photographs; poses are finer than bfloat16.

        Raises:
            FileNotFoundError: no such prior.
            ValueError: it cannot be used, or not there.

        >>> Models.load() == Models()
        True
        """
        here = torch.device("cpu")
        at, own = placement(device, dtype, here), (here, None)
        natural = None
        if photographs is not None or at != own:
            natural = load_prior(photographs).to(*at)
        at = placement(device, None if dtype == AUTO else dtype, here)
        three = None
        if objects is not None or at != own:
            three = load_objects_prior(objects).to(*at)
        return cls(natural, three, packaged_objects=objects is None)

    def of_deblur(self) -> dict[str, Any]:
        """Options of :func:`latentdem.deblur`, which computes where its prior is."""
        return {} if self.photographs is None else {"prior": self.photographs}

    def of_reconstruct(self) -> dict[str, Any]:
        """Options of :func:`latentdem.reconstruct`."""
        return {} if self.objects is None else {"prior": self.objects}

    def described(self) -> str:
        """One line for the page; empty where all is as packaged."""
        known = {"photographs": self.photographs, "objects": self.objects}
        return "; ".join(
            f"{what}: {prior.name}, on {prior.device} in {dtype_name(prior.dtype)}"
            for what, prior in known.items()
            if prior is not None
        )
