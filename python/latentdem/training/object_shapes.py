"""Objects to train the 3D prior on: procedural ones, and the block objects of ``pybullet``.

Every object is a triangle mesh whose parts carry a colour or a small texture of their own, so
that its sides can be told apart.  As shipped, pybullet's block objects have one colour each, and
many look alike from several sides: their parts are recoloured here.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TILE = 32
"""Side in pixels of a part's texture; the atlas is a row of them, so that it may be flipped."""


@dataclass(frozen=True)
class Part:
    """One part: ``vertices [n,3]``, ``faces [m,3]``, its texture ``[TILE,TILE,3]`` uint8."""

    vertices: np.ndarray
    faces: np.ndarray
    texture: np.ndarray


@dataclass(frozen=True)
class Shape:
    """A textured triangle soup, centred, inside a ball of the given radius.

    Args:
        triangles: ``[m,3,3]``.
        uv: ``[m,3,2]`` into ``atlas``.
        atlas: ``[TILE,k*TILE,3]`` uint8.
    """

    triangles: np.ndarray
    uv: np.ndarray
    atlas: np.ndarray

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """``stem.obj`` and ``stem.png`` in ``folder``; normals are those of the faces."""
        from PIL import Image

        a, b, c = self.triangles[:, 0], self.triangles[:, 1], self.triangles[:, 2]
        normal = np.cross(b - a, c - a)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        lines = [f"v {x:.5f} {y:.5f} {z:.5f}" for x, y, z in self.triangles.reshape(-1, 3)]
        lines += [f"vt {u:.5f} {v:.5f}" for u, v in self.uv.reshape(-1, 2)]
        lines += [f"vn {x:.5f} {y:.5f} {z:.5f}" for x, y, z in normal]
        for face in range(len(self.triangles)):
            corners = (f"{3 * face + k}/{3 * face + k}/{face + 1}" for k in (1, 2, 3))
            lines.append("f " + " ".join(corners))
        mesh, picture = folder / f"{stem}.obj", folder / f"{stem}.png"
        mesh.write_text("\n".join(lines) + "\n")
        Image.fromarray(self.atlas).save(picture)
        return mesh, picture


def _color(rng: np.random.Generator, used: list[np.ndarray]) -> np.ndarray:
    """A colour that differs from white and, if ten tries find one, from those in use."""
    best, distance = np.zeros(3), -1.0
    for _ in range(10):
        if rng.random() < 0.15:
            color = np.full(3, rng.uniform(0.05, 0.6))
        else:
            color = np.array(
                colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.35, 1))
            )
        nearest = min((float(np.linalg.norm(color - other)) for other in used), default=2.0)
        if nearest > distance:
            best, distance = color, nearest
        if distance > 0.6:
            break
    used.append(best)
    return best


def _texture(rng: np.random.Generator, used: list[np.ndarray]) -> np.ndarray:
    """Plain, halves, stripes, checks, dots or a ramp, ``[TILE,TILE,3]`` uint8."""
    first = _color(rng, used)
    kind = rng.choice(6, p=[0.5, 0.14, 0.12, 0.08, 0.08, 0.08])
    y, x = np.mgrid[0:TILE, 0:TILE] / TILE
    if rng.random() < 0.5:
        x, y = y, x
    count = int(rng.integers(2, 5))
    share = {
        0: np.zeros_like(x),
        1: (x > rng.uniform(0.3, 0.7)).astype(float),
        2: np.floor(x * 2 * count) % 2,
        3: (np.floor(x * count) + np.floor(y * count)) % 2,
        4: (np.hypot(x * count % 1 - 0.5, y * count % 1 - 0.5) < 0.3).astype(float),
        5: x,
    }[int(kind)]
    second = _color(rng, used) if kind else first
    mixed = first + share[..., None] * (second - first)
    return (mixed * 255).round().astype(np.uint8)


def assemble(parts: list[Part], extent: float) -> Shape:
    """Join parts into one mesh with an atlas, centred, its farthest corner at ``extent``."""
    triangles, uv = [], []
    for index, part in enumerate(parts):
        corners = part.vertices[part.faces]  # [m,3,3]
        low = part.vertices.min(0)
        local = (corners - low) / np.maximum(part.vertices.max(0) - low, 1e-9)
        normal = np.abs(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
        # The two axes across the face's main direction, whichever it is.
        axes = np.array([[1, 2], [0, 2], [0, 1]])[normal.argmax(1)]
        plane = np.take_along_axis(local, axes[:, None, :].repeat(3, 1), 2)
        # Half a texel inside the tile, where its neighbours cannot be seen.
        plane = (plane * (TILE - 1) + 0.5) / TILE
        uv.append(np.stack(((plane[..., 0] + index) / len(parts), plane[..., 1]), -1))
        triangles.append(corners)
    soup = np.concatenate(triangles).astype(np.float64)
    points = soup.reshape(-1, 3)
    soup = soup - (points.min(0) + points.max(0)) / 2
    soup *= extent / np.linalg.norm(soup, axis=-1).max()
    atlas = np.concatenate([part.texture for part in parts], 1)
    return Shape(soup, np.concatenate(uv), atlas)


def _prism(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An extruded random polygon, star-shaped about its middle."""
    corners = int(rng.integers(3, 9))
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if rng.random() < 0.4 else None
    angle = np.arange(corners) / corners * 2 * np.pi if angle is None else angle
    reach = rng.uniform(0.5, 1.0, corners)
    ring = np.stack((reach * np.cos(angle), reach * np.sin(angle)), 1)
    low = np.column_stack((ring, np.full(corners, -0.5)))
    high = np.column_stack((ring, np.full(corners, 0.5)))
    middle = np.array([[0, 0, -0.5], [0, 0, 0.5]])
    vertices = np.concatenate((low, high, middle))
    faces = []
    for i in range(corners):
        j = (i + 1) % corners
        faces += [(i, j, corners + j), (i, corners + j, corners + i)]
        faces += [(2 * corners, j, i), (2 * corners + 1, corners + i, corners + j)]
    return vertices, np.array(faces)


def _lathe(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random profile turned about z: vases, bottles, chess pieces."""
    levels, around = int(rng.integers(4, 9)), 20
    height = np.linspace(-0.5, 0.5, levels)
    radius = np.abs(np.cumsum(rng.normal(0, 0.18, levels)) + 0.4).clip(0.06, 0.8)
    radius = np.concatenate(([0], radius, [0]))
    height = np.concatenate((height[:1], height, height[-1:]))
    angle = np.arange(around) / around * 2 * np.pi
    vertices = np.stack(
        (
            radius[:, None] * np.cos(angle),
            radius[:, None] * np.sin(angle),
            np.broadcast_to(height[:, None], (levels + 2, around)),
        ),
        -1,
    ).reshape(-1, 3)
    faces = []
    for level in range(levels + 1):
        for i in range(around):
            a, b = level * around + i, level * around + (i + 1) % around
            faces += [(a, b, b + around), (a, b + around, a + around)]
    return vertices, np.array(faces)


def _primitive(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    from trimesh import creation

    makers: list[Callable[[], object]] = [
        lambda: creation.box((1, 1, 1)),
        lambda: creation.icosphere(2, 0.5),
        lambda: creation.cylinder(0.5, 1.0, sections=20),
        lambda: creation.cone(0.5, 1.0, sections=20),
        lambda: creation.torus(0.4, rng.uniform(0.08, 0.2), major_sections=20, minor_sections=10),
        lambda: creation.capsule(1.0, 0.35, count=[12, 12]),
    ]
    kind = rng.choice(8, p=[0.26, 0.12, 0.12, 0.08, 0.07, 0.07, 0.15, 0.13])
    if kind == 6:
        return _prism(rng)
    if kind == 7:
        return _lathe(rng)
    mesh = makers[int(kind)]()
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)  # type: ignore[attr-defined]


def _turn(rng: np.random.Generator) -> np.ndarray:
    """A rotation: upright with any heading, lying on a side, or (one in five) any at all."""
    from scipy.spatial.transform import Rotation

    if rng.random() < 0.2:
        return Rotation.random(random_state=rng).as_matrix()
    heading = Rotation.from_euler("z", rng.choice([0, 90, rng.uniform(0, 360)]), degrees=True)
    side = Rotation.from_euler(
        str(rng.choice(["x", "y"])), rng.choice([0, 0, 90, 180]), degrees=True
    )
    return (heading * side).as_matrix()


def procedural_shape(seed: int, extent: float) -> Shape:
    """A random object of three to eight parts, each touching an earlier one."""
    rng = np.random.default_rng([seed, 20260])
    used: list[np.ndarray] = []
    parts: list[Part] = []
    for index in range(int(rng.integers(3, 9))):
        vertices, faces = _primitive(rng)
        size = rng.uniform(0.5, 1.0, 3) if index == 0 else rng.uniform(0.18, 0.65, 3)
        if rng.random() < 0.2:
            size[rng.integers(3)] *= 2
        vertices = vertices * size @ _turn(rng).T
        if parts:
            host = parts[int(rng.integers(len(parts)))].vertices
            anchor = host[int(rng.integers(len(host)))]
            # A little inside the host, so that parts hang together.
            vertices = vertices + 0.9 * anchor + 0.1 * host.mean(0)
        parts.append(Part(vertices, faces, _texture(rng, used)))
    return assemble(parts, extent)


def read_parts(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Vertices and faces of every ``o`` group of an OBJ file."""
    vertices: list[list[float]] = []
    groups: list[list[list[int]]] = [[]]
    for line in path.read_text().splitlines():
        fields = line.split()
        if not fields:
            continue
        if fields[0] == "o":
            groups.append([])
        elif fields[0] == "v":
            vertices.append([float(x) for x in fields[1:4]])
        elif fields[0] == "f":
            corners = [int(field.split("/")[0]) - 1 for field in fields[1:]]
            groups[-1] += [
                [corners[0], corners[k], corners[k + 1]] for k in range(1, len(corners) - 1)
            ]
    points = np.array(vertices)
    parts = []
    for group in groups:
        if group:
            index, inverse = np.unique(np.array(group), return_inverse=True)
            parts.append((points[index], inverse.reshape(-1, 3)))
    return parts


def block_shape(path: Path, seed: int, extent: float) -> Shape:
    """A block object of pybullet (``random_urdfs/NNN/NNN.obj``), recoloured part by part."""
    rng = np.random.default_rng([seed, 20261])
    used: list[np.ndarray] = []
    turn = _turn(rng)
    parts = [Part(v @ turn.T, f, _texture(rng, used)) for v, f in read_parts(path)]
    return assemble(parts, extent)
