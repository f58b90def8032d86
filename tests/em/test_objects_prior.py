"""The objects prior: its data, its geometry, its file."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import latentdem_ext as ext
from latentdem.cli import app
from latentdem.io import file_digest
from latentdem.operators.pose import (
    camera_to_world,
    relative_pose,
    relative_rotation,
    rotation_error,
    wrap_pose,
)
from latentdem.priors.objects import (
    CameraModel,
    ObjectsPrior,
    ViewEmbedder,
    load_objects_prior,
    pose_features,
    save_objects_prior,
    target_rays,
    warp_by_proxy,
)
from latentdem.training import objects as objects_training
from latentdem.training.diffusion import SCHEDULER
from latentdem.training.object_shapes import procedural_shape
from latentdem.training.object_views import TEXTURED, VIEWS, object_names, on_white
from latentdem.training.objects import ConditionalDenoiser, PairSampler, pair_loss
from latentdem.training.view_autoencoder import (
    RECOLORED,
    build_view_autoencoder,
    encode_views,
)

pybullet = pytest.importorskip("pybullet", reason="pybullet draws the objects")


@pytest.fixture(scope="module")
def drawn():
    from latentdem.training.object_views import Renderer

    renderer = Renderer(CameraModel())
    names = ["procedural-900003", "block-950-0", "duck", "procedural-900003"]
    views = {i: renderer.draw(name, 6) for i, name in enumerate(names)}
    renderer.close()
    return views


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    networks = ConditionalDenoiser().eval().requires_grad_(False)
    scheduler = DDIMScheduler(**SCHEDULER)
    return ObjectsPrior(
        autoencoder=build_view_autoencoder().eval().requires_grad_(False),
        denoiser=networks.denoiser,
        embedder=networks.embedder,
        context=networks.context,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type="v_prediction",
        latent_mean=torch.zeros(8, 1, 1),
        latent_std=torch.ones(8, 1, 1),
        name="tiny",
    ), dict(scheduler.config)


def test_splits_share_no_object():
    train, held_out = object_names("train"), object_names("heldout")
    assert not set(train) & set(held_out)
    # A block object's colours are drawn anew; its shape must not be in both.
    shapes = {name.rsplit("-", 1)[0] for name in train if name.startswith("block")}
    assert not shapes & {name.rsplit("-", 1)[0] for name in held_out}
    assert len(held_out) >= 100 and set(TEXTURED) <= set(held_out)
    with pytest.raises(ValueError, match="split must be train or heldout, found 'test'"):
        object_names("test")


def test_shapes_fill_their_ball_and_differ():
    first, second = procedural_shape(1, 0.7), procedural_shape(2, 0.7)
    for shape in (first, second):
        reach = abs(shape.triangles).max()
        assert 0.3 < reach <= 0.7
        assert shape.uv.min() >= 0 and shape.uv.max() <= 1
    assert first.triangles.shape != second.triangles.shape


def test_drawing_is_repeatable(drawn):
    for first, again in zip(drawn[0], drawn[3], strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_views_and_poses_follow_our_cameras(drawn, index):
    images, poses, surface = drawn[index]
    camera = CameraModel()
    lens = ext.intrinsics_from_fov(torch.tensor(camera.fov), (64, 64))
    world_to_camera = ext.invert_pose(camera_to_world(poses))
    points = surface @ world_to_camera[:, :3, :3].mT + world_to_camera[:, None, :3, 3]
    pixel = points[..., :2] / points[..., 2:] * lens[:2] + lens[2:]
    column, row = pixel.floor().long().clamp(0, 63).unbind(-1)
    for view, alpha in enumerate(images[:, 3].float() / 255):
        # Within a pixel: thin parts are missed where no sample falls on them.
        spread = torch.nn.functional.max_pool2d(alpha[None], 3, 1, 1)[0]
        assert (spread[row[view], column[view]] > 0).float().mean() > 0.99
        # And the other way: what is covered has a point within two pixels.
        hit = torch.zeros(1, 1, 64, 64)
        hit[0, 0, row[view], column[view]] = 1
        near = torch.nn.functional.max_pool2d(hit, 5, 1, 2)[0, 0]
        assert near[alpha == 1].mean() > 0.95


def test_on_white():
    image = torch.zeros(4, 2, 2, dtype=torch.uint8)
    image[0], image[3, 0] = 255, 255
    assert torch.equal(on_white(image)[:, 0], torch.tensor([1.0, 0, 0])[:, None].expand(3, 2))
    assert torch.equal(on_white(image)[:, 1], torch.ones(3, 2))


def test_pose_features_are_those_of_zero123():
    source, target = torch.tensor([10.0, 20.0, 2.4]), torch.tensor([35.0, -70.0, 2.9])
    ours = pose_features(relative_pose(source, target))
    theirs = ext.zero123_condition(camera_to_world(source), camera_to_world(target))
    torch.testing.assert_close(ours, theirs * torch.tensor([-1.0, 1, 1, 1]), atol=1e-5, rtol=1e-5)


def test_poses_wrap_and_errors_are_angles():
    wrapped = wrap_pose(torch.tensor([95.0, 190.0, 5.0]), radius=(2.2, 3.0))
    torch.testing.assert_close(wrapped, torch.tensor([89.0, -170.0, 3.0]))
    poses = torch.tensor([[0.0, 0.0, 2.5], [0.0, 30.0, 2.5], [0.0, 70.0, 2.5]])
    turns = relative_rotation(poses[:1], poses)
    torch.testing.assert_close(rotation_error(turns[1], turns[2]), torch.tensor(40.0))
    assert rotation_error(turns[1], turns[1]) == 0


def test_warp_of_a_ball_is_the_ball_from_there():
    """A ball with a smooth texture of its own, drawn exactly from two cameras."""
    side, radius, fov = 48, 0.5, 40.0

    def draw(pose):
        lens = ext.intrinsics_from_fov(torch.tensor(fov), (side, side))
        to = camera_to_world(pose)
        axis = (torch.arange(side) + 0.5 - side / 2) / lens[0]
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        rays = torch.stack((x, y, torch.ones_like(x)), -1)
        rays = (rays / rays.norm(dim=-1, keepdim=True)) @ to[:3, :3].T
        nearest = -(rays @ to[:3, 3])
        miss = to[:3, 3].square().sum() - nearest**2
        point = to[:3, 3] + (nearest - (radius**2 - miss).clamp_min(0).sqrt())[..., None] * rays
        return torch.where((miss < radius**2)[..., None], point, 0.0).permute(2, 0, 1), miss

    source, target = torch.tensor([10.0, 0.0, 2.6]), torch.tensor([25.0, 30.0, 2.4])
    given, _ = draw(source)
    wanted, miss = draw(target)
    warped = warp_by_proxy(given[None], source[None], target[None], fov, (radius,))[0]
    inside = (miss < 0.8 * radius**2) & (warped[3] > 0.6)
    assert inside.sum() > 200
    assert (warped[:3] - wanted)[:, inside].abs().max() < 0.03
    same = warp_by_proxy(given[None], source[None], source[None], fov, (radius,))[0]
    centre = slice(side // 2 - 5, side // 2 + 5)
    assert (same[:3] - given)[:, centre, centre].abs().max() < 0.01


def test_prediction_is_differentiable_in_the_pose(tiny):
    prior, _ = tiny
    with torch.no_grad():
        given = prior.embed(torch.rand(2, 3, 64, 64))
    pose = torch.tensor([[5.0, 20.0, 0.1], [0.0, -40.0, 0.0]], requires_grad=True)
    z0, epsilon = prior.predict(torch.randn(2, 8, 16, 16), 500, given, pose)
    assert z0.shape == epsilon.shape == (2, 8, 16, 16)
    (gradient,) = torch.autograd.grad(z0.square().sum(), pose)
    assert torch.isfinite(gradient).all() and (gradient != 0).any(1).all()


def test_loss_of_hidden_views_does_not_see_them():
    networks = ConditionalDenoiser()
    arguments = (
        torch.tensor([[20.0, 0.0, 2.5]]), torch.randn(1, 2, 8, 16, 16),
        torch.tensor([[[20.0, 30.0, 2.5], [30.0, -50.0, 2.6]]]), torch.tensor([300, 700]),
        torch.randn(2, 8, 16, 16),
    )  # fmt: skip
    found = []
    for hidden in (True, False):
        for _ in range(2):
            torch.manual_seed(0)
            with torch.no_grad():
                loss, _ = pair_loss(
                    networks, torch.randn(1, 8, 16, 16) * (1 + len(found)), *arguments,
                    torch.full((2,), hidden), DDPMScheduler(**SCHEDULER),
                )  # fmt: skip
            found.append(float(loss))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[2] != pytest.approx(found[3], rel=1e-5)


def test_latents_are_encoded_anew_for_another_autoencoder(tmp_path):
    images = torch.randint(0, 256, (1, 3, 4, 64, 64), dtype=torch.uint8)
    shard = {"images": images, "poses": torch.zeros(1, 3, 3)}
    save_file(shard, tmp_path / "heldout-000.safetensors", {"names": '["a"]'})
    autoencoder = build_view_autoencoder().eval().requires_grad_(False)
    path = encode_views(tmp_path, "heldout", autoencoder, tmp_path)
    first = load_file(path)["latents"]
    assert first.shape == (1, 1, 3, 8, 16, 16)
    written = path.stat().st_mtime_ns
    assert encode_views(tmp_path, "heldout", autoencoder, tmp_path) == path
    assert path.stat().st_mtime_ns == written
    with torch.no_grad():
        next(autoencoder.encoder.parameters()).mul_(1.5)
    encode_views(tmp_path, "heldout", autoencoder, tmp_path)
    assert not torch.equal(load_file(path)["latents"], first)


def test_mirrored_views_come_with_mirrored_azimuths(tmp_path):
    images = torch.randint(0, 256, (1, 5, 4, 64, 64), dtype=torch.uint8)
    poses = torch.stack((torch.arange(5.0), 10 + torch.arange(5.0), torch.full((5,), 2.5)), 1)
    save_file(
        {"images": images, "poses": poses[None]},
        tmp_path / "train-000.safetensors",
        {"names": '["a"]'},
    )
    autoencoder = build_view_autoencoder().eval().requires_grad_(False)
    path = encode_views(tmp_path, "train", autoencoder, tmp_path, recolored=True)
    stored = load_file(path)["latents"]
    assert stored.shape == (1, 2 * len(RECOLORED), 5, 8, 16, 16)
    kinds = set()
    sampler = PairSampler(path, seed=0)
    for latent, pose in zip(*sampler.batch(40)[:2]):
        view = int(pose[0])  # the elevation is the view's number here
        same = (stored[0, :, view].float() - latent).flatten(1).norm(dim=1)
        kind = int(same.argmin())
        assert same[kind] == 0 and pose[1] == (10 + view) * (1 - 2 * (kind % 2))
        kinds.add(kind)
    assert len(kinds) == 2 * len(RECOLORED)


def test_rays_of_the_wanted_view():
    source, target = torch.tensor([[10.0, 20.0, 2.6]]), torch.tensor([[35.0, -60.0, 2.4]])
    direction, moment = target_rays(source, target, 40.0, 16)[0].split(3)
    torch.testing.assert_close(direction.norm(dim=0), torch.ones(16, 16))
    torch.testing.assert_close((direction * moment).sum(0), torch.zeros(16, 16), atol=1e-6, rtol=0)
    # A point of the world lies on the ray of the pixel that it projects to.
    point = torch.tensor([0.2, -0.1, 0.3])
    lens = ext.intrinsics_from_fov(torch.tensor(40.0), (16, 16))
    to, back = camera_to_world(target[0]), camera_to_world(source[0])
    seen = to[:3, :3].T @ (point - to[:3, 3])
    pixel = seen[:2] / seen[2] * lens[:2] + lens[2:]
    x, y = (2 * pixel / 16 - 1).tolist()
    at = torch.nn.functional.grid_sample(
        torch.cat((direction, moment))[None], torch.tensor([[[[x, y]]]]), align_corners=False
    ).flatten()
    here = back[:3, :3].T @ point
    torch.testing.assert_close(torch.linalg.cross(here, at[:3]), at[3:], atol=2e-3, rtol=0)
    with torch.no_grad():
        turned = target_rays(source + torch.tensor([0.0, 77, 0]),
                             target + torch.tensor([0.0, 77, 0]), 40.0, 16)  # fmt: skip
    torch.testing.assert_close(turned[0], torch.cat((direction, moment)), atol=1e-5, rtol=0)


def test_file_round_trip(tiny, tmp_path):
    prior, scheduler = tiny
    path = tmp_path / "objects.safetensors"
    save_objects_prior(path, prior, scheduler)
    loaded = load_objects_prior(path)
    assert loaded.camera == prior.camera and loaded.name == "tiny"
    views = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded.embed(views).tokens, prior.embed(views).tokens, atol=0.02,
                               rtol=0.02)  # fmt: skip
    with pytest.raises(ValueError, match="views must be 64 x 64"):
        loaded.encode(torch.rand(1, 3, 32, 32))
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    assert json.loads(metadata["camera"])["fov"] == 40.0


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="latentdem train-objects-prior"):
        load_objects_prior(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="not an objects prior"):
        load_objects_prior(other)
    other.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_objects_prior(other)


def test_embedder_tells_elevation_within_its_range():
    embedder = ViewEmbedder(8, 16, 32, 1)
    tokens, camera = embedder(torch.randn(3, 8, 16, 16))
    assert tokens.shape == (3, 65, 32) and camera.shape == (3, 2)


def test_draw_objects_keeps_what_is_there(tmp_path):
    for number in (0, 1):
        (tmp_path / f"heldout-00{number}.safetensors").write_bytes(b"drawn before")
    result = CliRunner().invoke(app, ["draw-objects", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for number in (0, 1):
        assert (tmp_path / f"heldout-00{number}.safetensors").read_bytes() == b"drawn before"
    last = load_file(tmp_path / "heldout-002.safetensors")
    assert last["images"].shape == (len(TEXTURED), VIEWS["heldout"], 4, 64, 64)
    assert (last["images"][:, :, 3].amax((2, 3)) == 255).all()  # every view shows its object


def test_training_goes_on_from_a_prior(tiny, tmp_path, monkeypatch):
    prior, config = tiny
    start = tmp_path / "start.safetensors"
    prior = replace(prior, latent_mean=torch.full((8, 1, 1), 0.5))
    save_objects_prior(start, prior, config)
    seen = {}

    def no_steps(name, model, loss, plan, checkpoint, **rest):
        seen[name] = plan.learning_rate, checkpoint.name
        return model

    def encode(data, split, autoencoder, runs, **rest):
        path = tmp_path / f"{split}.safetensors"
        save_file({"latents": torch.zeros(1, 1, 5, 8, 16, 16), "poses": torch.zeros(1, 5, 3)}, path)
        return path

    monkeypatch.setattr(objects_training, "draw_split", lambda folder, split: None)
    monkeypatch.setattr(objects_training, "encode_views", encode)
    monkeypatch.setattr(objects_training, "train", no_steps)
    arguments = ["train-objects-prior", "--start", str(start), "--device", "cpu"]
    arguments += ["--runs", str(tmp_path), "-o", str(tmp_path / "new.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert list(seen) == ["denoiser"]  # the autoencoder is not trained
    rate, checkpoint = seen["denoiser"]
    assert rate < objects_training.LEARNING_RATE["cpu"]
    # One of a training from nothing must not be taken for it.
    assert checkpoint == f"denoiser-from-{file_digest(start)[:12]}.safetensors"
    before, after = load_file(start), load_file(tmp_path / "new.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_refuses_a_start_of_another_size(tiny, tmp_path):
    prior, config = tiny
    other = ViewEmbedder(8, 16, objects_training.TOKEN_WIDTH, layers=1)
    start = tmp_path / "start.safetensors"
    save_objects_prior(start, replace(prior, embedder=other), config)
    arguments = ["train-objects-prior", "--start", str(start), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--runs", str(tmp_path)])
    assert result.exit_code == 1
    assert "its embedder is not of the size that is trained here" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["train-objects-prior", "--start", str(tmp_path / "none")])
    assert result.exit_code == 1 and "none" in result.output
