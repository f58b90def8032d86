"""Radiance fields of objects: density and colour on a voxel grid.

World: z up, the object at the origin.  The grid fills the cube ``[-extent, extent]^3``, x along
W, y along H, z along D, trilinear.  Cameras look at the origin, three numbers each
(:mod:`latentdem.operators.pose`).  Letters: N views, s their side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import latentdem_ext as ext
from latentdem.operators.pose import camera_to_world

_CONVENTIONS = {
    "kind": "radiance_field",
    "grid": "[C,D,H,W] fills [-extent,extent]^3, corners included; x along W, y along H, z along D",
    "world": "right-handed, z up, object at the origin",
    "density": "per world unit of length; alpha = 1 - exp(-density * step)",
    "color": "RGB in [0, 1], display values",
    "camera": "looks at the origin from (elevation, azimuth from +x towards +y, radius)",
}


@dataclass(frozen=True)
class RadianceField:
    """Density and colour on a voxel grid.

    Args:
        density: ``[1,D,H,W]``, not negative, per world unit of length.
        color: ``[3,D,H,W]`` in [0, 1].
        extent: half the side of the grid's cube in world units.

    Raises:
        ValueError: shapes that do not match, or an extent that is not positive.
    """

    density: Tensor
    color: Tensor
    extent: float = 1.0

    def __post_init__(self) -> None:
        if self.density.dim() != 4 or self.density.shape[0] != 1 or not self.density.numel():
            raise ValueError(f"density must have shape [1,D,H,W], found {list(self.density.shape)}")
        if self.color.shape != (3, *self.density.shape[1:]):
            raise ValueError(
                f"color must have shape [3,D,H,W] with density's D, H, W, found "
                f"{list(self.color.shape)} beside {list(self.density.shape)}"
            )
        if not self.extent > 0:
            raise ValueError(f"extent must be positive, found {self.extent}")

    @property
    def voxel(self) -> float:
        """Largest distance of neighbouring voxels in world units."""
        return 2 * self.extent / max(min(self.density.shape[1:]) - 1, 1)

    def to(self, device: torch.device | str) -> RadianceField:
        """The same field on another device."""
        return RadianceField(self.density.to(device), self.color.to(device), self.extent)

    def render(
        self,
        poses: Tensor,
        *,
        fov: float,
        image_size: int,
        samples_per_ray: int = 96,
        background: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the field, differentiable in it and in the poses.

        A ray is sampled at whole and a half steps from its camera, so that a view does not depend
        on the others of its batch; the renderer passes over what lies outside the cube.

        Args:
            poses: ``[N,3]`` elevation and azimuth in degrees, radius.
            fov: full angle of view in degrees.
            image_size: s.
            samples_per_ray: samples in the width of the cube.
            background: grey value where the field is transparent.

        Returns:
            ``color [N,3,s,s]``, ``opacity [N,1,s,s]`` and ``depth [N,1,s,s]``, the distance along
            the ray weighted with, and not divided by, opacity.

        >>> field = RadianceField(torch.ones(1, 8, 8, 8), torch.ones(3, 8, 8, 8))
        >>> color, opacity, depth = field.render(
        ...     torch.tensor([[20.0, 0.0, 2.5]]), fov=40.0, image_size=16)
        >>> color.shape, opacity.shape
        (torch.Size([1, 3, 16, 16]), torch.Size([1, 1, 16, 16]))
        """
        if poses.dim() != 2 or poses.shape[1] != 3:
            raise ValueError(f"poses must have shape [N,3], found {list(poses.shape)}")
        # The operator's cube is [-1, 1]^3: lengths are divided by extent, densities multiplied.
        poses = poses.to(self.density)
        unit = torch.tensor([1.0, 1.0, 1 / self.extent]).to(poses)
        lens = ext.intrinsics_from_fov(poses.new_tensor(fov), (image_size, image_size))
        step = 2 / samples_per_ray
        farthest = float(poses.detach()[:, 2].max()) / self.extent if len(poses) else 0.0
        count = math.ceil((farthest + 3**0.5) / step)
        color, opacity, depth = ext.volume_render(
            self.density * self.extent,
            self.color,
            camera_to_world(poses * unit),
            lens.expand(len(poses), 4),
            image_size=(image_size, image_size),
            near=0.0,
            far=count * step,
            samples_per_ray=count,
            background=poses.new_full((3,), background),
        )
        return color, opacity, depth * self.extent

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors), its conventions in the metadata."""
        tensors = {
            "density": self.density.detach().cpu().contiguous(),
            "color": self.color.detach().cpu().contiguous(),
        }
        save_file(tensors, path, _CONVENTIONS | {"extent": repr(self.extent)})

    @classmethod
    def load(cls, path: Path) -> RadianceField:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a radiance field.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no radiance field at {path}")
        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if metadata.get("kind") != _CONVENTIONS["kind"]:
            raise ValueError(f"{path} is a safetensors file, but not a radiance field of latentdem")
        return cls(tensors["density"], tensors["color"], float(metadata["extent"]))
