"""Views of the training objects, drawn by pybullet's CPU renderer, in safetensors shards.

A shard holds ``images [O,V,4,64,64]`` uint8 (RGBA, straight alpha), ``poses [O,V,3]`` float32
(elevation and azimuth in degrees, radius) and ``surface [O,P,3]`` float32 points on the objects,
with their names in its metadata.  Splits are by name: an object is in one of them, always.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdem.priors.objects import CameraModel
from latentdem.training.object_shapes import Shape, block_shape, procedural_shape, read_parts

SIDE = 64
VIEWS = {"train": 12, "heldout": 24}
"""Of each object: for training many objects teach more than many views."""

SURFACE_POINTS = 2048
PER_SHARD = 100
PROCEDURAL = 8200
"""Training objects with a generated shape; block objects are the same 900, colours anew."""

BLOCKS = 900
BLOCK_COLORINGS = 2
BROKEN = (168,)
"""Block objects whose file, as shipped, holds vertices that are not numbers."""

HELD_OUT_PROCEDURAL = 100
TEXTURED = {
    "duck": ("duck.obj", "duckCM.png"),
    "teddy": ("teddy2_VHACD_CHs.obj", None),
    "soccerball": ("soccerball.obj", "colors16.png"),
    "lego": ("lego/lego.obj", None),
}
"""pybullet's own meshes, for tests only."""

UPRIGHT_Y = ("duck.obj", "teddy2_VHACD_CHs.obj")
"""Those that stand along y."""


def object_names(split: str) -> list[str]:
    """Names of the objects of ``train`` or ``heldout``; the number is the seed of the colours."""
    if split == "train":
        names = [f"procedural-{i:05d}" for i in range(PROCEDURAL)]
        blocks = [i for i in range(BLOCKS) if i not in BROKEN]
        return names + [f"block-{i:03d}-{c}" for i in blocks for c in range(BLOCK_COLORINGS)]
    if split == "heldout":
        names = [f"procedural-{900000 + i}" for i in range(HELD_OUT_PROCEDURAL)]
        return names + [f"block-{i:03d}-0" for i in range(BLOCKS, 1000)] + sorted(TEXTURED)
    raise ValueError(f"split must be train or heldout, found {split!r}")


def _assets() -> Path:
    try:
        import pybullet_data
    except ImportError:
        raise RuntimeError(
            "drawing the training objects needs pybullet: pip install latentdem[objects]"
        ) from None
    return Path(pybullet_data.getDataPath())


class Renderer:
    """pybullet's software renderer with a scene of one object.

    Views are drawn at twice their side and averaged, premultiplied by coverage.
    """

    def __init__(self, camera: CameraModel, side: int = SIDE) -> None:
        _assets()
        import pybullet

        self.bullet, self.camera, self.side = pybullet, camera, side
        self.client = pybullet.connect(pybullet.DIRECT)
        # Files are named alike for every object: what is cached by name would be the last one.
        pybullet.setPhysicsEngineParameter(enableFileCaching=0, physicsClientId=self.client)

    def close(self) -> None:
        """Release the renderer."""
        self.bullet.disconnect(physicsClientId=self.client)

    def _place(self, name: str, folder: Path) -> np.ndarray:
        """Load an object and return its triangles ``[m,3,3]`` in world units."""
        bullet, client = self.bullet, self.client
        bullet.resetSimulation(physicsClientId=client)
        bullet.setPhysicsEngineParameter(enableFileCaching=0, physicsClientId=client)
        kind, _, rest = name.partition("-")
        shape: Shape | None = None
        scale, offset, tilt = 1.0, np.zeros(3), (0.0, 0.0, 0.0, 1.0)
        if kind == "procedural":
            shape = procedural_shape(int(rest), self.camera.extent)
        elif kind == "block":
            number, coloring = rest.split("-")
            mesh_path = _assets() / "random_urdfs" / number / f"{number}.obj"
            shape = block_shape(mesh_path, 1000 * int(coloring) + int(number), self.camera.extent)
        if shape is not None:
            mesh, picture = shape.write(folder, name)
            triangles, texture = shape.triangles, str(picture)
            tint = (1.0, 1.0, 1.0, 1.0)
        else:
            file, image = TEXTURED[name]
            mesh = _assets() / file
            triangles = np.concatenate([v[f] for v, f in read_parts(mesh)])
            if file in UPRIGHT_Y:  # (x, y, z) -> (x, -z, y)
                triangles = np.stack((triangles[..., 0], -triangles[..., 2], triangles[..., 1]), -1)
                tilt = (0.5**0.5, 0.0, 0.0, 0.5**0.5)
            points = triangles.reshape(-1, 3)
            middle = (points.min(0) + points.max(0)) / 2
            scale = self.camera.extent / float(np.linalg.norm(points - middle, axis=1).max())
            offset = -scale * middle
            triangles = triangles * scale + offset
            texture = "" if image is None else str(_assets() / image)
            tint = (1.0, 1.0, 1.0, 1.0) if image else (0.9, 0.55, 0.3, 1.0)
        visual = bullet.createVisualShape(
            bullet.GEOM_MESH,
            fileName=str(mesh),
            meshScale=[scale] * 3,
            rgbaColor=tint,
            physicsClientId=client,
        )
        body = bullet.createMultiBody(
            baseVisualShapeIndex=visual,
            basePosition=offset.tolist(),
            baseOrientation=tilt,
            physicsClientId=client,
        )
        if texture:
            bullet.changeVisualShape(
                body,
                -1,
                textureUniqueId=bullet.loadTexture(texture, physicsClientId=client),
                rgbaColor=tint,
                physicsClientId=client,
            )
        return triangles

    def _view(self, pose: np.ndarray, light: np.ndarray, ambient: float) -> np.ndarray:
        """RGBA ``[side,side,4]`` uint8."""
        bullet = self.bullet
        e, a, r = np.deg2rad(pose[0]), np.deg2rad(pose[1]), pose[2]
        eye = r * np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        _, _, color, _, segments = bullet.getCameraImage(
            2 * self.side,
            2 * self.side,
            bullet.computeViewMatrix(eye.tolist(), [0, 0, 0], [0, 0, 1]),
            bullet.computeProjectionMatrixFOV(self.camera.fov, 1.0, 0.5, 10.0),
            lightDirection=light.tolist(),
            lightColor=[1, 1, 1],
            shadow=0,
            lightAmbientCoeff=ambient,
            lightDiffuseCoeff=1.05 - ambient,
            lightSpecularCoeff=0.03,
            renderer=bullet.ER_TINY_RENDERER,
            physicsClientId=self.client,
        )
        shape = (self.side, 2, self.side, 2)
        inside = (np.asarray(segments).reshape(shape) >= 0).astype(np.float32)[..., None]
        rgb = np.asarray(color, dtype=np.float32).reshape(*shape, 4)[..., :3]
        coverage = inside.sum((1, 3))
        mean = (rgb * inside).sum((1, 3)) / np.maximum(coverage, 1)
        return np.concatenate((mean, coverage * 255 / 4), -1).round().astype(np.uint8)

    def draw(self, name: str, views: int = VIEWS["heldout"]) -> tuple[Tensor, Tensor, Tensor]:
        """Random views of the named object, always the same.

        Returns:
            ``images [V,4,side,side]`` uint8, ``poses [V,3]``, ``surface [P,3]``.
        """
        import zlib

        rng = np.random.default_rng([zlib.crc32(name.encode()), 20262])
        elevation = rng.uniform(*self.camera.elevation, views)
        azimuth = rng.uniform(-180, 180, views)
        poses = np.stack((elevation, azimuth, rng.uniform(*self.camera.radius, views)), 1)
        light = np.append(rng.normal(size=2), rng.uniform(0.8, 2.0))
        ambient = rng.uniform(0.5, 0.7)
        with tempfile.TemporaryDirectory() as folder:
            triangles = self._place(name, Path(folder))
            images = np.stack([self._view(pose, light, ambient) for pose in poses])
        edges = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        area = np.linalg.norm(edges, axis=1)
        chosen = rng.choice(len(triangles), SURFACE_POINTS, p=area / area.sum())
        weights = rng.dirichlet((1, 1, 1), SURFACE_POINTS)
        surface = (triangles[chosen] * weights[..., None]).sum(1)
        return (
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(poses).float(),
            torch.from_numpy(surface).float(),
        )


def _shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:03d}.safetensors"


def _draw_shard(folder: Path, split: str, number: int) -> None:
    """Draw one shard, in a process of its own."""
    chosen = object_names(split)[number * PER_SHARD : (number + 1) * PER_SHARD]
    renderer = Renderer(CameraModel())
    drawn = [renderer.draw(name, VIEWS[split]) for name in chosen]
    renderer.close()
    tensors = {
        key: torch.stack([item[index] for item in drawn])
        for index, key in enumerate(("images", "poses", "surface"))
    }
    path = _shard_path(folder, split, number)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"names": json.dumps(chosen)})
    partial.replace(path)


def draw_split(folder: Path, split: str) -> None:
    """Draw the objects of ``split`` into ``folder/split-NNN.safetensors``, a process a core.

    Shards that are there are kept, so that it goes on if killed.
    """
    _assets()  # says what is missing before processes are started
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-len(object_names(split)) // PER_SHARD)
    missing = [i for i in range(shards) if not _shard_path(folder, split, i).exists()]
    if not missing:
        return
    # Started afresh: a forked process would share the threads' locks of torch.
    context = multiprocessing.get_context("spawn")
    workers = min(os.cpu_count() or 1, len(missing))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_draw_shard, folder, split, i) for i in missing]
        for future in track(as_completed(futures), f"drawing {split} objects", total=len(futures)):
            future.result()


def read_shards(folder: Path, split: str) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Names and tensors of every shard of ``split``, in order.

    Raises:
        FileNotFoundError: none is there.
    """
    paths = sorted(folder.glob(f"{split}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"no {split} views in {folder}; draw them with: latentdem draw-objects -o {folder}"
        )
    for path in paths:
        with safe_open(path, framework="pt") as handle:
            names = json.loads(handle.metadata()["names"])
        yield names, load_file(path)


def on_white(images: Tensor) -> Tensor:
    """RGBA uint8 ``[...,4,h,w]`` -> RGB float in [0, 1] on a white ground."""
    scaled = images.float() / 255
    alpha = scaled[..., 3:, :, :]
    return scaled[..., :3, :, :] * alpha + (1 - alpha)
