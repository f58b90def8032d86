"""A feed-forward baseline without a diffusion prior: pose-free views to a volume in one pass.

In the manner of LEAP (Jiang et al., "LEAP: Liberate Sparse-View 3D Modeling from Camera Poses",
ICLR 2024): features of all views, the first one marked, are gathered by cross-attention into one
volume in the frame of the first view, which :func:`latentdem_ext.volume_render` draws; the loss
compares the drawings with true views.  A head tells every view's pose, so that rotation errors
can be compared; the volume does not use it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdem.operators.pose import wrap_degrees
from latentdem.operators.radiance_field import RadianceField
from latentdem.priors.latent import read_weights
from latentdem.priors.objects import CameraModel
from latentdem.training.common import TrainingPlan, train
from latentdem.training.object_views import on_white, read_shards

GRID = 8
"""Tokens along each axis of the volume; each becomes 4 x 4 x 4 voxels."""

MARGIN = 1.07
"""Half a side of the volume's cube over the radius of the ball that objects lie in."""

DENSITY_GAIN = 20.0
"""Unit of density per half a side of the cube."""

DENSITY_START = -4.0
"""Argument of the softplus before training: nearly transparent everywhere."""

POSE_WEIGHT = 0.05
OPACITY_WEIGHT = 0.3


@dataclass(frozen=True)
class PoseFreeResult:
    """One object from one pass.

    Args:
        poses: ``[K,3]`` of the given views, the first at azimuth zero.
        field: the object, in the world of these poses.
    """

    poses: Tensor
    field: RadianceField


def object_color(views: Tensor) -> Tensor:
    """Mean colour ``[B,3]`` of what is not white in ``views [B,K,3,s,s]``; black if all is."""
    weight = (views.amin(2, keepdim=True) < 0.95).float()
    return (views * weight).sum((1, 3, 4)) / weight.sum((1, 3, 4)).clamp_min(1)


class PoseFreeNet(nn.Module):
    """Views to a volume and poses.

    Args:
        camera: of the training views.
        width: of the tokens.
        encoder_layers: over the tokens of all views together.
        decoder_layers: in which the volume's tokens attend to them and to one another.
    """

    def __init__(
        self,
        camera: CameraModel,
        width: int = 128,
        encoder_layers: int = 3,
        decoder_layers: int = 2,
    ) -> None:
        super().__init__()
        self.camera = camera
        self.settings = {
            "width": width,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
        }
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 1, 65, width))
        self.marks = nn.Parameter(0.2 * torch.randn(2, 1, width))  # the first view, any other
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            ),
            encoder_layers,
            norm=nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        # Tokens whose cell reaches into the ball of the objects; no other can hold anything.
        axis = (torch.arange(GRID) + 0.5) * 2 / GRID - 1
        cell = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        nearest = (cell.abs() - 1 / GRID).clamp_min(0).norm(dim=1)
        self.cells: Tensor
        self.register_buffer("cells", torch.nonzero(nearest < 1 / MARGIN)[:, 0], persistent=False)
        self.queries = nn.Parameter(0.5 * torch.randn(1, len(self.cells), width))
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(
                width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            ),
            decoder_layers,
            norm=nn.LayerNorm(width),
        )
        self.grow = nn.Sequential(
            nn.ConvTranspose3d(width, 32, 2, stride=2),
            nn.GELU(),
            nn.Conv3d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv3d(32, 4 * 8, 1),
        )
        self._start_smooth()
        self.pose = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 4))

    @torch.no_grad()
    def _start_smooth(self) -> None:
        """Children of a voxel start alike, so that no checkerboard has to be unlearned."""
        first, last = self.grow[0], self.grow[-1]
        assert isinstance(first, nn.ConvTranspose3d) and isinstance(last, nn.Conv3d)
        first.weight.copy_(first.weight[..., :1, :1, :1].expand_as(first.weight))
        for value in (last.weight, last.bias):
            assert value is not None
            children = value.unflatten(0, (4, 8))
            children.copy_(children[:, :1].expand_as(children))

    def forward(self, views: Tensor) -> tuple[list[RadianceField], Tensor]:
        """Fields and pose features of ``views [B,K,3,64,64]`` in [0, 1].

        Returns:
            B fields of 32 x 32 x 32 voxels and ``[B,K,4]``: elevation and radius in units of the
            camera model's ranges, sine and cosine of the azimuth relative to the first view.
        """
        batch, count = views.shape[:2]
        maps = self.stem(2 * views.flatten(0, 1) - 1)
        tokens = maps.flatten(2).transpose(1, 2).unflatten(0, (batch, count))
        tokens = torch.cat((torch.zeros_like(tokens[:, :, :1]), tokens), 2) + self.position
        marks = torch.cat((self.marks[:1], self.marks[1:].expand(count - 1, -1, -1)))
        features = self.encoder((tokens + marks).flatten(1, 2))
        summary = features.unflatten(1, (count, -1))[:, :, 0]
        pose = self.pose(torch.cat((summary[:, :1].expand_as(summary), summary), -1))
        gathered = self.decoder(self.queries.expand(batch, -1, -1), features)
        volume = gathered.new_zeros(batch, GRID**3, gathered.shape[-1])
        volume = volume.index_copy(1, self.cells, gathered).transpose(1, 2)
        raw = self.grow(volume.unflatten(2, (GRID, GRID, GRID)))
        side = 4 * GRID
        raw = raw.unflatten(1, (4, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        raw = raw.reshape(batch, 4, side, side, side)
        extent = MARGIN * self.camera.extent
        density = DENSITY_GAIN / extent * F.softplus(raw[:, :1] + DENSITY_START)
        axis = torch.linspace(-MARGIN, MARGIN, side).square().to(raw)
        inside = axis[:, None, None] + axis[:, None] + axis < MARGIN**2
        density = density * inside  # nothing is beyond the ball
        start = torch.logit(object_color(views), eps=0.02)[..., None, None, None]
        color = (raw[:, 1:] + start).sigmoid()
        return [RadianceField(d, c, extent) for d, c in zip(density, color)], pose

    def poses(self, features: Tensor) -> Tensor:
        """``[...,K,4]`` of :meth:`forward` -> poses ``[...,K,3]``, the first at azimuth zero."""
        (e0, e1), (r0, r1) = self.camera.elevation, self.camera.radius
        elevation = (e0 + e1) / 2 + (e1 - e0) / 2 * features[..., 0]
        radius = (r0 + r1) / 2 + (r1 - r0) / 2 * features[..., 1]
        azimuth = torch.rad2deg(torch.atan2(features[..., 2], features[..., 3]))
        first = torch.zeros_like(azimuth[..., :1])
        azimuth = torch.cat((first, azimuth[..., 1:]), -1)
        return torch.stack((elevation.clamp(e0, e1), azimuth, radius.clamp(r0, r1)), -1)

    def pose_targets(self, poses: Tensor) -> Tensor:
        """Poses ``[...,K,3]`` -> the ``[...,K,4]`` that :meth:`forward` should give."""
        (e0, e1), (r0, r1) = self.camera.elevation, self.camera.radius
        azimuth = torch.deg2rad(poses[..., 1] - poses[..., :1, 1])
        return torch.stack(
            (
                (2 * poses[..., 0] - e0 - e1) / (e1 - e0),
                (2 * poses[..., 2] - r0 - r1) / (r1 - r0),
                azimuth.sin(),
                azimuth.cos(),
            ),
            -1,
        )

    @torch.no_grad()
    def reconstruct(self, views: Tensor) -> PoseFreeResult:
        """One object from its ``views [K,3,64,64]`` in [0, 1] on white."""
        fields, features = self(views[None])
        return PoseFreeResult(self.poses(features)[0], fields[0])


@dataclass(frozen=True)
class Batch:
    """Objects to learn from: ``given [B,K,4,64,64]`` and ``wanted [B,T,4,64,64]`` RGBA uint8,
    with their ``given_poses`` and ``wanted_poses``, azimuths relative to the first given view."""

    given: Tensor
    given_poses: Tensor
    wanted: Tensor
    wanted_poses: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.given.to(device),
            self.given_poses.to(device),
            self.wanted.to(device),
            self.wanted_poses.to(device),
        )


class ViewSampler:
    """Random views of random objects; the last object of every shard is for validation.

    Args:
        shards: tensors ``images [O,V,4,64,64]`` uint8 and ``poses [O,V,3]``.
    """

    def __init__(self, shards: list[dict[str, Tensor]]) -> None:
        self.shards = shards

    def sample(
        self, objects: int, given: int, wanted: int, seed: int, *, validation: bool = False
    ) -> Batch:
        """A batch, a function of its arguments; training objects are mirrored and recoloured."""
        generator = torch.Generator().manual_seed(seed)

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        images, poses = [], []
        for _ in range(objects):
            shard = self.shards[draw(len(self.shards))]
            count, views = shard["poses"].shape[:2]
            index = count - 1 if validation else draw(max(count - 1, 1))
            order = torch.randperm(views, generator=generator)[: given + wanted]
            image, pose = shard["images"][index, order], shard["poses"][index, order].clone()
            pose[:, 1] = wrap_degrees(pose[:, 1] - pose[0, 1])
            if not validation:
                colors = torch.randperm(3, generator=generator).tolist()
                image = image[:, [*colors, 3]]
                if draw(2):  # y -> -y
                    image, pose[:, 1] = image.flip(-1), -pose[:, 1]
            images.append(image)
            poses.append(pose)
        image, pose = torch.stack(images), torch.stack(poses)
        return Batch(image[:, :given], pose[:, :given], image[:, given:], pose[:, given:])


def pose_free_loss(net: PoseFreeNet, batch: Batch, *, samples_per_ray: int = 40) -> Tensor:
    """Squared error of the drawn views and opacities, and of the pose features."""
    fields, features = net(on_white(batch.given))
    truth, alpha = on_white(batch.wanted), batch.wanted[:, :, 3:].float() / 255
    total = POSE_WEIGHT * F.mse_loss(features, net.pose_targets(batch.given_poses))
    for index, field in enumerate(fields):
        view, opacity, _ = field.render(
            batch.wanted_poses[index],
            fov=net.camera.fov,
            image_size=truth.shape[-1],
            samples_per_ray=samples_per_ray,
        )
        loss = F.mse_loss(view, truth[index]) + OPACITY_WEIGHT * F.mse_loss(opacity, alpha[index])
        total = total + loss / len(fields)
    return total


@torch.no_grad()
def validate_pose_free(net: PoseFreeNet, sampler: ViewSampler, objects: int = 48) -> str:
    """Novel-view PSNR (true poses of the wanted views) and the median azimuth error of pairs."""
    batch = sampler.sample(objects, 2, 2, seed=0, validation=True).to(net.position.device)
    errors, turns = [], []
    for index in range(objects):
        result = net.reconstruct(on_white(batch.given[index]))
        view, _, _ = result.field.render(
            batch.wanted_poses[index], fov=net.camera.fov, image_size=batch.wanted.shape[-1]
        )
        squared = (view.clamp(0, 1) - on_white(batch.wanted[index])).square().mean((1, 2, 3))
        errors += squared.tolist()
        turn = wrap_degrees(result.poses[1, 1] - batch.given_poses[index, 1, 1]).abs()
        turns.append(float(turn))
    psnr = -10 * sum(math.log10(max(e, 1e-12)) for e in errors) / len(errors)
    return f"{psnr:.2f} dB, azimuth error {torch.tensor(turns).median():.1f} degrees"


def train_pose_free(
    sampler: ViewSampler,
    checkpoint: Path,
    *,
    minutes: float,
    objects: int | None = None,
    device: torch.device | None = None,
) -> PoseFreeNet:
    """Train for ``minutes`` (goes on from ``checkpoint``) and return the averaged weights."""
    device = device or torch.device("cpu")
    objects = objects or {"cpu": 4, "cuda": 24}[device.type]
    torch.manual_seed(0)
    net = PoseFreeNet(CameraModel())

    def loss_function(model: nn.Module, step: int) -> Tensor:
        assert isinstance(model, PoseFreeNet)
        given = (2, 3, 2, 1, 2, 3)[step % 6]
        return pose_free_loss(model, sampler.sample(objects, given, 3, seed=1 + step).to(device))

    def validate(model: nn.Module) -> str:
        assert isinstance(model, PoseFreeNet)
        return validate_pose_free(model, sampler)

    plan = TrainingPlan(
        minutes=minutes, learning_rate=1e-3, warmup_steps=100, ema_decay=0.995, device=device
    )
    trained = train(
        "pose-free", net, loss_function, plan, checkpoint, resume=True, validate=validate
    )
    assert isinstance(trained, PoseFreeNet)
    return trained.cpu()


def save_pose_free(path: Path, net: PoseFreeNet) -> None:
    """Write float16 weights and what is needed to build the network, in one file."""
    tensors = {key: value.half().contiguous() for key, value in net.state_dict().items()}
    metadata = {
        "kind": "pose-free",
        "settings": json.dumps(net.settings),
        "camera": json.dumps(vars(net.camera)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def load_pose_free(path: Path | str) -> PoseFreeNet:
    """Load what :func:`make_pose_free` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a pose-free regressor of this package.
    """
    path = Path(path)
    metadata, tensors = read_weights(path, "train-pose-free", "regressor")
    if metadata.get("kind") != "pose-free":
        raise ValueError(f"{path} is a safetensors file, but not a pose-free regressor")
    camera = CameraModel.from_json(metadata["camera"])
    net = PoseFreeNet(camera, **json.loads(metadata["settings"]))
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def make_pose_free(
    data: Path,
    runs: Path,
    output: Path,
    *,
    minutes: float = 22,
    device: torch.device | None = None,
) -> None:
    """Train (or go on training) on the views in ``data`` and write the regressor to ``output``.

    Args:
        data: folder of the training views (:mod:`latentdem.training.object_views`).
        runs: folder of the checkpoint.
        output: safetensors, float16.
        minutes: of training in all.
        device: where; the CPU unless given.
    """
    sampler = ViewSampler([tensors for _, tensors in read_shards(data, "train")])
    checkpoint = runs / "pose_free.safetensors"
    net = train_pose_free(sampler, checkpoint, minutes=minutes, device=device)
    save_pose_free(output, net)
