"""The feed-forward baseline: it learns an object, keeps the gauge, and comes back from disk."""

import pytest
import torch
from safetensors.torch import save_file

from latentdem.operators.radiance_field import RadianceField
from latentdem.priors.objects import CameraModel
from latentdem.training.object_views import on_white
from latentdem.training.pose_free import (
    PoseFreeNet,
    ViewSampler,
    load_pose_free,
    make_pose_free,
    pose_free_loss,
    save_pose_free,
)


def two_boxes(side=16):
    """A red box towards +x and a blue one towards +y, opaque."""
    density = torch.zeros(1, side, side, side)
    color = torch.zeros(3, side, side, side)
    middle = slice(side // 2 - 3, side // 2 + 3)
    density[:, middle, middle, side // 2 : -3] = 60
    color[0, middle, middle, side // 2 : -3] = 1
    density[:, middle, side // 2 + 3 : -3, middle] = 60
    color[2, middle, side // 2 + 3 : -3, middle] = 1
    return RadianceField(density, color, 0.75)


def object_shard(objects=2, views=12, side=64):
    generator = torch.Generator().manual_seed(5)
    poses = torch.rand(objects, views, 3, generator=generator)
    poses = poses * torch.tensor([60.0, 360.0, 0.8]) + torch.tensor([-10.0, -180.0, 2.2])
    images = []
    for of_object in poses:
        color, opacity, _ = two_boxes().render(of_object, fov=40.0, image_size=side)
        straight = (color - (1 - opacity)) / opacity.clamp_min(1e-3)
        rgba = torch.cat((straight.clamp(0, 1), opacity), 1)
        images.append((rgba * 255).round().to(torch.uint8))
    return {"images": torch.stack(images), "poses": poses}


def small_net():
    return PoseFreeNet(CameraModel(), width=32, encoder_layers=1, decoder_layers=1)


def test_one_object_is_learned():
    torch.manual_seed(0)
    net = small_net()
    batch = ViewSampler([object_shard()]).sample(2, 2, 3, seed=3)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = pose_free_loss(net, batch, samples_per_ray=24)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_size_of_the_shipped_network():
    parameters = sum(value.numel() for value in PoseFreeNet(CameraModel()).parameters())
    assert parameters <= 3_000_000
    assert 2 * parameters <= 6_000_000  # float16


def test_samples_are_seeded_relative_and_never_from_validation_objects():
    shard = object_shard(objects=3)
    sampler = ViewSampler([shard])
    a, b = (sampler.sample(4, 2, 3, seed=9) for _ in range(2))
    assert torch.equal(a.given, b.given) and torch.equal(a.wanted_poses, b.wanted_poses)
    assert a.given.shape == (4, 2, 4, 64, 64) and a.wanted_poses.shape == (4, 3, 3)
    assert (a.given_poses[:, 0, 1] == 0).all()
    assert float(a.wanted_poses[..., 1].abs().max()) <= 180
    held = {float(e) for e in shard["poses"][-1, :, 0]}
    assert all(float(e) not in held for e in a.given_poses[..., 0].flatten())
    validation = sampler.sample(4, 2, 3, seed=9, validation=True)
    assert all(float(e) in held for e in validation.given_poses[..., 0].flatten())


def test_mirrored_and_recoloured_samples_are_views_of_one_mirrored_object():
    shard = object_shard(objects=2, side=32)
    sampler = ViewSampler([shard])
    seen = set()
    for seed in range(12):
        batch = sampler.sample(1, 1, 3, seed=seed)
        # Which object it is: colours permuted, y turned over if azimuths run backwards.
        index = [float(e) for e in shard["poses"][0, :, 0]].index(float(batch.given_poses[0, 0, 0]))
        other = [float(e) for e in shard["poses"][0, :, 0]].index(
            float(batch.wanted_poses[0, 0, 0])
        )
        turn = float(shard["poses"][0, other, 1] - shard["poses"][0, index, 1])
        turn = (turn + 180) % 360 - 180
        mirrored = abs(float(batch.wanted_poses[0, 0, 1]) - turn) > 1e-3
        assert float(batch.wanted_poses[0, 0, 1]) == pytest.approx(
            -turn if mirrored else turn, abs=1e-3
        )
        image = shard["images"][0, other, 3]
        expected = image.flip(-1) if mirrored else image
        assert torch.equal(batch.wanted[0, 0, 3], expected)
        seen.add(mirrored)
    assert seen == {True, False}


def test_pose_features_invert():
    net = small_net()
    poses = torch.tensor([[[-5.0, 20.0, 2.3], [40.0, -170.0, 2.9], [10.0, 110.0, 2.6]]])
    features = net.pose_targets(poses)
    expected = poses - torch.tensor([0.0, 20.0, 0.0])
    expected[0, 1, 1] = 170.0  # -190, wrapped
    assert torch.allclose(net.poses(features), expected, atol=1e-3)


def test_further_views_may_change_places():
    net = small_net().eval()
    views = torch.rand(3, 3, 64, 64)
    a = net.reconstruct(views)
    b = net.reconstruct(views[[0, 2, 1]])
    assert torch.allclose(a.field.density, b.field.density, rtol=1e-3, atol=1e-4)
    assert torch.allclose(a.poses[[0, 2, 1]], b.poses, rtol=1e-3, atol=1e-3)
    assert float(a.poses[0, 1]) == 0


def test_trained_saved_and_loaded(tmp_path, capsys):
    shard = object_shard()
    data = tmp_path / "data"
    data.mkdir()
    save_file(shard, data / "train-000.safetensors", {"names": '["a", "b"]'})
    make_pose_free(data, tmp_path / "runs", tmp_path / "out.safetensors", minutes=0.01)
    first = load_pose_free(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").stat().st_size < 6e6
    # The budget is spent: the same command does not train again.
    make_pose_free(data, tmp_path / "runs", tmp_path / "again.safetensors", minutes=0.01)
    assert "resumed at step" in capsys.readouterr().out
    second = load_pose_free(tmp_path / "again.safetensors")
    views = on_white(shard["images"][0, :2])
    a, b = first.reconstruct(views), second.reconstruct(views)
    assert torch.equal(a.field.density, b.field.density)
    assert torch.equal(a.poses, b.poses)


def test_round_trip_keeps_settings_and_camera(tmp_path):
    net = PoseFreeNet(CameraModel(fov=35.0), width=32, encoder_layers=1, decoder_layers=2)
    save_pose_free(tmp_path / "net.safetensors", net)
    loaded = load_pose_free(tmp_path / "net.safetensors")
    assert loaded.settings == net.settings
    assert loaded.camera == net.camera
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name


def test_what_is_no_regressor_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no regressor at"):
        load_pose_free(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a pose-free regressor"):
        load_pose_free(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no train views in"):
        make_pose_free(tmp_path, tmp_path, tmp_path / "out.safetensors", minutes=1)
