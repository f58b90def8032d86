"""Radiance fields: drawn, fitted, poses found, kept on disk, turned into meshes and pictures."""

import math

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

from latentdem.metrics import psnr
from latentdem.operators.field import RadianceField, fit_field, refine_poses
from latentdem.operators.mesh import (
    EmptyFieldError,
    chamfer_distance,
    extract_mesh,
    save_mesh,
    surface_level,
)
from latentdem.operators.pose import camera_to_world, rotation_error
from latentdem.pictures import sheet, turntable

FOV = 40.0
SIDE = 32


def axes(side):
    line = torch.linspace(-1, 1, side)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.stack((x, y, z))


def solid(distance, scale=0.03):
    """Density of a signed distance ``[D,H,W]``, zero well outside."""
    density = 60 * torch.sigmoid(-distance / scale)
    return torch.where(density < 0.1, 0.0, density)[None]


def ball(centre=(0.0, 0.0, 0.0), radius=0.5, side=40):
    place = axes(side) - torch.tensor(centre)[:, None, None, None]
    color = (axes(side) + 1) / 2
    return RadianceField(solid(place.norm(dim=0) - radius), color)


@pytest.fixture(scope="module")
def scene():
    """A red ball, a blue box and a green bar: no two sides alike."""
    place = axes(48)
    red = (place - torch.tensor([0.25, 0.0, 0.0])[:, None, None, None]).norm(dim=0) - 0.35
    parts = [(red, (0.9, 0.2, 0.1))]
    for centre, half, color in (
        ((-0.25, 0.1, -0.1), (0.2, 0.3, 0.35), (0.1, 0.4, 0.9)),
        ((0.0, -0.35, 0.2), (0.4, 0.12, 0.12), (0.2, 0.7, 0.2)),
    ):
        away = (place - torch.tensor(centre)[:, None, None, None]).abs()
        parts.append(((away - torch.tensor(half)[:, None, None, None]).amax(0), color))
    distance = torch.stack([d for d, _ in parts])
    color = torch.tensor([c for _, c in parts]).T[:, distance.argmin(0)]
    return RadianceField(solid(distance.amin(0)), color)


def around(count, seed):
    generator = torch.Generator().manual_seed(seed)
    elevation = 50 * torch.rand(count, generator=generator) - 5
    azimuth = torch.arange(count) * 360 / count - 180 + 11 * seed
    radius = 2.3 + 0.6 * torch.rand(count, generator=generator)
    return torch.stack((elevation, azimuth, radius), 1)


@torch.no_grad()
def draw(field, poses):
    return field.render(poses, fov=FOV, image_size=SIDE, samples_per_ray=128)[:2]


@pytest.fixture(scope="module")
def observed(scene):
    poses = around(12, 0)
    return (*draw(scene, poses), poses)


def fit(views, poses, **settings):
    return fit_field(
        views, poses, fov=FOV, resolution=32, iterations=90, samples_per_ray=40, **settings
    )


@pytest.fixture(scope="module")
def fitted(observed):
    views, masks, poses = observed
    with torch.random.fork_rng():
        return fit(views, poses, masks=masks)


def turned(estimate, truth):
    return rotation_error(camera_to_world(estimate)[:, :3, :3], camera_to_world(truth)[:, :3, :3])


def test_the_camera_sees_right_what_lies_at_plus_y_and_above_what_lies_at_plus_z():
    pose = torch.tensor([[0.0, 0.0, 2.5]])
    color, opacity, _ = ball((0.0, 0.4, 0.3), 0.2).render(pose, fov=FOV, image_size=SIDE)
    rows, columns = torch.nonzero(opacity[0, 0] > 0.5).double().mean(0)
    # One world unit at distance 2.5 is this many pixels.
    scale = SIDE / (2 * 2.5 * math.tan(math.radians(FOV / 2)))
    assert float(columns) == pytest.approx(15.5 + 0.4 * scale, abs=0.5)
    assert float(rows) == pytest.approx(15.5 - 0.3 * scale, abs=0.5)
    assert torch.equal(color[0, :, -1, 0], torch.ones(3))
    centre = ball(radius=0.5).render(pose, fov=FOV, image_size=SIDE)
    assert float(centre[2][0, 0, 16, 16]) == pytest.approx(2.0, abs=0.05)


def test_a_view_does_not_depend_on_its_batch(scene):
    poses = torch.tensor([[10.0, 20.0, 2.25], [30.0, 170.0, 2.95]])
    both, _ = draw(scene, poses)
    for k in range(2):
        torch.testing.assert_close(both[k : k + 1], draw(scene, poses[k : k + 1])[0])


def test_extent_is_the_half_side_in_world_units():
    field = ball(side=24)
    small = RadianceField(2 * field.density, field.color, 0.5)
    far, _, depth = field.render(torch.tensor([[5.0, 9.0, 2.6]]), fov=FOV, image_size=SIDE)
    near, _, half = small.render(torch.tensor([[5.0, 9.0, 1.3]]), fov=FOV, image_size=SIDE)
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(half, depth / 2)


def test_rendering_differentiates_in_field_and_poses():
    generator = torch.Generator().manual_seed(0)
    field = RadianceField(
        (3 * torch.rand(1, 6, 6, 6, generator=generator, dtype=torch.double)).requires_grad_(),
        torch.rand(3, 6, 6, 6, generator=generator, dtype=torch.double).requires_grad_(),
        0.75,
    )
    poses = torch.tensor([[10.0, 20.0, 2.5]], dtype=torch.double, requires_grad=True)

    def loss(density, color, pose):
        views = RadianceField(density, color, 0.75).render(
            pose, fov=FOV, image_size=4, samples_per_ray=12
        )
        return sum((view * view.detach().cos()).sum() for view in views)

    value = loss(field.density, field.color, poses)
    for variable in torch.autograd.grad(value, (field.density, field.color, poses)):
        assert bool(torch.isfinite(variable).all())
        assert float(variable.abs().max()) > 0

    def total(pose):
        return field.render(pose, fov=FOV, image_size=4, samples_per_ray=12)[1].sum()

    (slope,) = torch.autograd.grad(total(poses), poses)
    for k in range(3):
        shift = torch.zeros_like(poses)
        shift[0, k] = 1e-5
        with torch.no_grad():
            numeric = (total(poses + shift) - total(poses - shift)) / 2e-5
        assert float(slope[0, k]) == pytest.approx(float(numeric), rel=1e-4, abs=1e-8)


def test_saved_and_loaded_fields_are_equal(scene, tmp_path):
    field = RadianceField(scene.density, scene.color, 0.8)
    field.save(tmp_path / "field.safetensors")
    again = RadianceField.load(tmp_path / "field.safetensors")
    assert torch.equal(again.density, field.density)
    assert torch.equal(again.color, field.color)
    assert again.extent == 0.8


def test_files_that_are_no_fields_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no radiance field at"):
        RadianceField.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="but not a radiance field of latentdem"):
        RadianceField.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        RadianceField.load(tmp_path / "text")


def test_a_fit_predicts_views_it_has_not_seen(fitted, scene):
    unseen = around(6, 1)
    truth, mask = draw(scene, unseen)
    color, opacity = draw(fitted.field, unseen)
    assert float(psnr(color, truth).min()) > 29
    found, true = opacity > 0.5, mask > 0.5
    assert float((found & true).sum() / (found | true).sum()) > 0.95
    assert float(fitted.residual.max()) < 0.03


def test_a_fit_is_reproducible_and_reports_progress(observed):
    views, _, poses = observed
    seen = []
    one, two = (
        fit_field(
            views,
            poses,
            fov=FOV,
            resolution=12,
            iterations=6,
            samples_per_ray=16,
            seed=3,
            progress=lambda done, total: seen.append((done, total)),
        )
        for _ in range(2)
    )
    assert torch.equal(one.field.density, two.field.density)
    assert seen == [(k, 6) for k in range(1, 7)] * 2


def test_a_fit_goes_on_from_a_field(fitted, observed):
    views, masks, poses = observed
    more = fit_field(
        views, poses, fov=FOV, masks=masks, start=fitted.field, resolution=32, iterations=10
    )
    assert float(more.residual.mean()) < 1.5 * float(fitted.residual.mean())


def test_wrong_poses_are_found_while_fitting(observed):
    views, masks, poses = observed
    start = poses.clone()
    start[3] += torch.tensor([6.0, -7.0, 0.1])
    start[8] += torch.tensor([-5.0, 8.0, -0.1])
    refine = torch.zeros(len(poses), dtype=torch.bool)
    refine[[3, 8]] = True
    found = fit(views, start, masks=masks, refine=refine)
    assert float(turned(start, poses)[[3, 8]].min()) > 7
    assert float(turned(found.poses, poses).max()) < 2
    assert float((found.poses - poses)[:, 2].abs().max()) < 0.05
    assert torch.equal(found.poses[~refine], start[~refine])


def test_a_view_that_contradicts_the_others_has_the_largest_residual(observed):
    views, masks, poses = observed
    lie = poses.clone()
    lie[5, 1] += 90
    found = fit(views, lie, masks=masks)
    others = torch.arange(len(poses)) != 5
    assert float(found.residual[5]) > 2 * float(found.residual[others].max())
    believed = torch.ones(len(poses))
    believed[5] = 0
    # A view that is not believed leaves no trace in the field.
    without = fit(views, lie, masks=masks, weights=believed)
    assert float(without.residual[others].max()) < 0.04


def test_cameras_return_to_where_a_field_was_seen_from(scene, observed):
    views, masks, poses = observed
    generator = torch.Generator().manual_seed(2)
    sign = (torch.rand(len(poses), 3, generator=generator) > 0.5) * 2.0 - 1
    start = poses + sign * torch.tensor([8.0, 10.0, 0.1])
    found, residual = refine_poses(scene, views, start, fov=FOV, masks=masks, iterations=40)
    assert float(turned(start, poses).min()) > 8
    assert float(turned(found, poses).max()) < 1
    assert float((found - poses)[:, 2].abs().max()) < 0.02
    assert float(residual.max()) < 0.02


def test_only_free_coordinates_move_and_stay_in_range(scene, observed):
    views, _, poses = observed
    start = poses[:2] + torch.tensor([3.0, 3.0, 0.05])
    refine = torch.tensor([[True, False, True], [False, False, False]])
    found, _ = refine_poses(
        scene, views[:2], start, fov=FOV, refine=refine, iterations=5, radius_range=(2.4, 2.5)
    )
    assert torch.equal(found[~refine], start[~refine])
    assert float(found[0, 0]) != float(start[0, 0])
    assert 2.4 <= float(found[0, 2]) <= 2.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"poses": torch.zeros(3, 3)}, r"poses must have shape \[N,3\] with N = 2, found \[3, 3\]"),
        ({"views": torch.zeros(2, 3, 8, 9)}, r"views must have shape \[N,3,s,s\]"),
        ({"masks": torch.zeros(2, 8, 8)}, r"masks must have shape \[N,1,s,s\]"),
        ({"weights": torch.tensor([1.0, -1.0])}, r"weights must be \[N\], not negative"),
        ({"refine": torch.zeros(3, dtype=torch.bool)}, r"refine must have shape \[N\] or \[N,3\]"),
        ({"resolution": 1}, "resolution must be at least 2"),
        ({"views": torch.zeros(0, 3, 8, 8), "poses": torch.zeros(0, 3)}, "at least one view"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, text):
    arguments = {"views": torch.zeros(2, 3, 8, 8), "poses": torch.zeros(2, 3), "fov": FOV}
    with pytest.raises(ValueError, match=text):
        fit_field(**(arguments | change))


def test_fields_check_their_grids():
    with pytest.raises(ValueError, match=r"density must have shape \[1,D,H,W\]"):
        RadianceField(torch.zeros(2, 4, 4, 4), torch.zeros(3, 4, 4, 4))
    with pytest.raises(ValueError, match=r"color must have shape \[3,D,H,W\]"):
        RadianceField(torch.zeros(1, 4, 4, 4), torch.zeros(3, 4, 4, 5))
    with pytest.raises(ValueError, match="extent must be positive"):
        RadianceField(torch.zeros(1, 4, 4, 4), torch.zeros(3, 4, 4, 4), 0.0)
    field = ball(side=8)
    with pytest.raises(ValueError, match=r"poses must have shape \[N,3\], found \[3\]"):
        field.render(torch.zeros(3), fov=FOV, image_size=8)


def test_the_mesh_of_a_ball_has_its_radius_place_and_colours():
    centre = torch.tensor([0.1, -0.2, 0.05])
    mesh = extract_mesh(ball(tuple(centre.tolist()), 0.5), level=30.0)
    assert mesh.is_watertight
    distance = np.linalg.norm(mesh.vertices - centre.numpy(), axis=1)
    assert distance.min() > 0.48 and distance.max() < 0.52
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.03)
    expected = 255 * (mesh.vertices + 1) / 2
    assert np.abs(mesh.visual.vertex_colors[:, :3] - expected).max() < 12


def test_the_mesh_of_a_hollow_ball_with_specks_is_one_solid_ball():
    distance = axes(40).norm(dim=0)
    density = solid((distance - 0.5).abs() - 0.1)
    density[0, 2:4, 2:4, 2:4] = 60
    mesh = extract_mesh(RadianceField(density, torch.ones(3, 40, 40, 40)), level=20.0)
    assert mesh.body_count == 1
    assert mesh.volume > 0.95 * 4 / 3 * math.pi * 0.6**3


def test_the_mesh_file_opens_with_colours_and_y_up(tmp_path):
    mesh = extract_mesh(ball((0.2, 0.0, 0.3), 0.4))
    save_mesh(mesh, tmp_path / "mesh.glb")
    again = trimesh.load(tmp_path / "mesh.glb", force="mesh", process=False)
    assert again.visual.kind == "vertex"
    x, y, z = mesh.vertices.T
    np.testing.assert_allclose(again.vertices, np.stack((x, z, -y), 1), atol=1e-5)
    np.testing.assert_array_equal(again.visual.vertex_colors, mesh.visual.vertex_colors)
    assert again.volume == pytest.approx(mesh.volume, rel=1e-4)


def test_a_fitted_field_becomes_a_mesh_near_the_object(fitted, scene):
    truth = extract_mesh(scene, level=30.0)
    points = torch.from_numpy(trimesh.sample.sample_surface(truth, 4000, seed=1)[0])
    mesh = extract_mesh(fitted.field)
    assert 1 - math.exp(-surface_level(fitted.field) * fitted.field.voxel) == pytest.approx(0.45)
    pixel = 2 * 2.6 * math.tan(math.radians(FOV / 2)) / SIDE
    assert chamfer_distance(mesh, points, samples=4000) < pixel


def test_chamfer_distance_of_concentric_spheres_is_the_gap():
    inner, outer = (trimesh.creation.icosphere(4, radius) for radius in (0.5, 0.6))
    points = torch.from_numpy(np.array(outer.vertices))
    assert chamfer_distance(inner, points) == pytest.approx(0.1, abs=0.005)
    with pytest.raises(ValueError, match=r"points must have shape \[M,3\]"):
        chamfer_distance(inner, torch.zeros(0, 3))


def test_an_empty_field_has_no_mesh():
    empty = RadianceField(torch.zeros(1, 8, 8, 8), torch.zeros(3, 8, 8, 8))
    with pytest.raises(EmptyFieldError, match="the field has no surface: its density reaches 0"):
        extract_mesh(empty)
    with pytest.raises(EmptyFieldError, match="reaches 60 and the level is 99"):
        extract_mesh(ball(side=16), level=99.0)


def test_a_turntable_turns_once_and_loops(tmp_path):
    path = turntable(ball(side=16), tmp_path / "t.webp", fov=FOV, frames=7, image_size=48)
    with Image.open(path) as animation:
        assert animation.n_frames == 7
        assert animation.size == (48, 48)
        assert animation.info["loop"] == 0
        first = np.asarray(animation.convert("RGB")).astype(float)
        animation.seek(3)
        later = np.asarray(animation.convert("RGB")).astype(float)
    assert first[0, 0].min() > 250
    assert np.abs(first - later).mean() > 2


def test_a_sheet_has_its_views_in_rows_with_labels():
    colors = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8)
    plain = sheet(colors, 2, tile=16)
    assert plain.size == (2 * 16 + 3 * 4, 2 * 16 + 3 * 4)
    assert plain.getpixel((5, 5)) == (255, 0, 0)
    assert plain.getpixel((25, 5)) == (0, 255, 0)
    assert plain.getpixel((5, 25)) == (0, 0, 255)
    labelled = sheet(colors, 3, ["a", "much too long for a tile", ""], tile=16)
    assert labelled.size == (3 * 16 + 4 * 4, 16 + 14 + 2 * 4)
    assert np.asarray(labelled)[21:37].max() == 255
    with pytest.raises(ValueError, match="labels must be 3, one for each view, found 1"):
        sheet(colors, 3, ["a"])
    with pytest.raises(ValueError, match="columns must be positive, found 0"):
        sheet(colors, 0)
    with pytest.raises(ValueError, match=r"images must have shape \[N,3,s,s\]"):
        sheet(colors[0], 1)
