"""A stand-in for an objects prior that knows its one object exactly, for tests of the method."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from latentdem.operators.radiance_field import RadianceField
from latentdem.priors.objects import CameraModel, ViewEmbedding

SIDE = 32


def blobs(side=24, shift=0.0):
    """Five coloured balls of which no turn looks like another."""
    grid = torch.linspace(-0.75, 0.75, side)
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    centres = [
        (0.4, 0.0, 0.0, 0.25, (0.9, 0.1, 0.1)),
        (-0.2, 0.35, 0.1, 0.2, (0.1, 0.7, 0.2)),
        (-0.2, -0.3, -0.2, 0.22, (0.1, 0.2, 0.9)),
        (0.0, 0.0, 0.4, 0.15, (0.9, 0.8, 0.1)),
        (0.1, 0.2 + shift, -0.4, 0.15, (0.6, 0.1, 0.7)),
    ]
    density = torch.zeros(1, side, side, side)
    color = torch.full((3, side, side, side), 0.5)
    for cx, cy, cz, radius, rgb in centres:
        distance = ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2).sqrt()
        density = density + 40 * torch.sigmoid((radius - distance) / 0.04)[None]
        near = (distance < radius + 0.12)[None]
        color = torch.where(near, torch.tensor(rgb)[:, None, None, None], color)
    return RadianceField(density, color, 0.75)


@dataclass
class ExactPrior:
    """``predict`` renders the object; a given view's true pose comes from looking it up.

    ``known``: the views ``[V,3,s,s]`` that can be given, with their true ``poses [V,3]``.
    """

    scene: RadianceField
    known: torch.Tensor
    poses: torch.Tensor
    elevation_bias: float = 0.0
    image_size: int = SIDE
    camera: CameraModel = field(default_factory=CameraModel)
    name: str = "stand-in"
    calls: int = 0

    device, dtype = torch.device("cpu"), torch.float32
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.03, 0.11, 1000) ** 2, 0)
    timesteps = 1000

    def to(self, device=None, dtype=None):
        return self

    def encode(self, views):
        return F.pixel_unshuffle(2 * views - 1, 4)

    def decode(self, latents):
        return (F.pixel_shuffle(latents, 4) + 1) / 2

    def embed(self, views):
        distance = (views[:, None] - self.known).square().mean((2, 3, 4))
        poses = self.poses[distance.argmin(1)]
        elevation = poses[:, 0] + self.elevation_bias * torch.tensor([1.0, -1.0, 1.0])[: len(views)]
        return ViewEmbedding(self.encode(views), poses[:, None], elevation, poses[:, 2])

    def predict(self, noisy, timestep, given, pose):
        self.calls += len(noisy)
        t = torch.as_tensor(timestep).expand(len(noisy))
        abar = self.alphas_cumprod[t][:, None, None, None]
        color, _, _ = self.scene.render(
            given.tokens[:, 0] + pose, fov=40.0, image_size=self.image_size, samples_per_ray=32
        )
        # Nothing given: a grey average view, as an unconditional prediction is.
        given_none = (given.tokens == 0).all(2).all(1)[:, None, None, None]
        z0 = torch.where(given_none, torch.zeros(()), self.encode(color))
        return z0, (noisy - abar.sqrt() * z0) / (1 - abar).sqrt()


TRUE_POSES = torch.tensor([[20.0, 0.0, 2.5], [10.0, 60.0, 2.6], [30.0, -75.0, 2.4]])


def exact_prior(**options):
    """Prior, and its three views ``[3,3,s,s]``."""
    scene = blobs()
    with torch.no_grad():
        views, _, _ = scene.render(TRUE_POSES, fov=40.0, image_size=SIDE, samples_per_ray=32)
    return ExactPrior(scene, views, TRUE_POSES, **options), views
