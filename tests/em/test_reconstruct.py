"""From views without poses to an object: the fused sampler, the driver, the result, the command."""

import importlib
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from object_stand_in import SIDE, TRUE_POSES, exact_prior
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import latentdem
from latentdem.cli import app
from latentdem.em.denoising_score import DenoisingScore
from latentdem.em.novel_views import fusion_weights, ring_poses, sample_views, view_angles
from latentdem.em.object_field import (
    believable_poses,
    contradictions,
    object_masks,
    uncertain_views,
)
from latentdem.em.reconstruct_settings import PoseSettings, ReconstructSettings, SamplerSettings
from latentdem.io import to_pil
from latentdem.operators.pose import wrap_degrees
from latentdem.operators.radiance_field import RadianceField
from latentdem.priors.objects import ObjectsPrior, ViewEmbedder, save_objects_prior
from latentdem.training.autoencoder import build_autoencoder

QUICK = ReconstructSettings(
    rounds=1,
    resolution=16,
    iterations=30,
    samples_per_ray=24,
    poses=PoseSettings(azimuth_step=30, levels=(0.5,), modes=2, iterations=2),
    sampler=SamplerSettings(targets=4, steps=4),
)
FILES = {
    "field.safetensors",
    "mesh.glb",
    "novel_views.png",
    "poses.json",
    "report.json",
    "turntable.webp",
}


# The fused E-step ---------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2, 3])
def test_fusion_weights_are_the_published_ones(views):
    beta, nu2 = 0.3, 0.7
    variance = torch.full((views,), nu2)
    variance[0] = 0
    weights = fusion_weights(beta, variance)
    total = views * beta + nu2
    expected = [(beta + nu2) / total] + [beta / total] * (views - 1)
    assert weights.tolist() == pytest.approx(expected)
    assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("views", [2, 3])
def test_fusion_weights_in_the_limits(views):
    unsure = torch.ones(views)
    unsure[0] = 0
    assert fusion_weights(0.3, 0 * unsure).tolist() == pytest.approx([1 / views] * views)
    lonely = fusion_weights(0.3, 1e9 * unsure)
    assert lonely.tolist() == pytest.approx([1.0] + [0.0] * (views - 1), abs=1e-6)
    assert fusion_weights(0.0, 0 * unsure).tolist() == pytest.approx([1 / views] * views)
    own = torch.rand(5, views, generator=torch.Generator().manual_seed(0))
    assert fusion_weights(0.1, unsure, own).sum(1).tolist() == pytest.approx([1.0] * 5)


def test_the_nearer_view_weighs_more():
    poses = torch.tensor([[0.0, 0.0, 2.5], [0.0, 90.0, 2.5]])
    angles = view_angles(torch.tensor([[0.0, 30.0, 2.5], [90.0, 0.0, 2.5]]), poses)
    torch.testing.assert_close(angles, torch.tensor([[30.0, 60.0], [90.0, 90.0]]))
    weights = fusion_weights(0.5, torch.zeros(2), (angles / 90).square())
    assert float(weights[0, 0]) > 0.5 > float(weights[0, 1])


def test_ring_goes_round_within_the_range():
    ring = ring_poses(TRUE_POSES, 6, 25.0, (-10.0, 40.0))
    assert ring[:, 0].tolist() == pytest.approx([40, -5, 40, -5, 40, -5])
    assert ring[:, 1].tolist() == pytest.approx([0, 60, 120, -180, -120, -60])
    assert ring[:, 2].tolist() == pytest.approx([2.5] * 6)


def test_sampled_views_are_the_objects():
    prior, images = exact_prior()
    targets = ring_poses(TRUE_POSES, 4, 10.0, (-10.0, 50.0))
    found = sample_views(
        prior, prior.embed(images), TRUE_POSES, targets, settings=SamplerSettings(steps=4)
    )
    truth, _, _ = prior.scene.render(targets, fov=40.0, image_size=SIDE, samples_per_ray=32)
    torch.testing.assert_close(found.views, truth, atol=2e-3, rtol=0)
    assert torch.equal(found.poses, TRUE_POSES)  # no M-step without a score
    assert found.evaluations == prior.calls == 4 * 4 * 3


def test_guidance_goes_beyond_the_given_views():
    prior, images = exact_prior()
    given = prior.embed(images[:1])
    found = [
        sample_views(
            prior,
            given,
            TRUE_POSES[:1],
            TRUE_POSES[:1],
            settings=SamplerSettings(steps=2, guidance=guidance),
        ).latents
        for guidance in (1.0, 1.5)
    ]
    # The stand-in's unconditional prediction is zero.
    torch.testing.assert_close(found[1], 1.5 * found[0], atol=1e-4, rtol=1e-4)


def test_a_target_does_not_depend_on_the_others():
    prior, images = exact_prior()
    targets = ring_poses(TRUE_POSES, 4, 10.0, (-10.0, 50.0))
    settings = SamplerSettings(steps=3)
    given = prior.embed(images[:2])
    wrong = TRUE_POSES[:2] + torch.tensor([[0.0, 0.0, 0.0], [0.0, 10.0, 0.0]])
    together = sample_views(prior, given, wrong, targets, settings=settings, seed=5)
    alone = sample_views(prior, given, wrong, targets[:1], settings=settings, seed=5)
    torch.testing.assert_close(alone.latents, together.latents[:1], atol=1e-5, rtol=1e-5)
    other = sample_views(prior, given, wrong, targets[:1], settings=settings, seed=6)
    assert not torch.equal(other.latents, alone.latents)


def test_m_step_within_the_trajectory_turns_poses_back():
    prior, images = exact_prior()
    given = prior.embed(images)
    score = DenoisingScore(prior, given, QUICK.poses, 0)
    targets = ring_poses(TRUE_POSES, 4, 10.0, (-10.0, 50.0))
    wrong = TRUE_POSES.clone()
    wrong[1:, 1] += torch.tensor([8.0, -8.0])
    settings = SamplerSettings(steps=8, every=2)
    found = sample_views(prior, given, wrong, targets, settings=settings, score=score)
    error = wrap_degrees(found.poses - TRUE_POSES)[:, 1].abs()
    assert float(error[0]) == 0
    assert float(error.max()) < 2
    turned = [step["turned"] for step in found.history]
    assert turned[0] > 0
    assert turned[1] == turned[3] == turned[5] == 0  # skip-gradient
    assert turned[7] > 0


def test_an_azimuth_is_wrapped():
    prior, images = exact_prior()
    given = prior.embed(images[:2])
    score = DenoisingScore(prior, given, QUICK.poses, 0)
    start = TRUE_POSES[:2] + torch.tensor([[0.0, 0.0, 0.0], [0.0, 360.0, 0.0]])
    settings = SamplerSettings(steps=2, every=1)
    found = sample_views(prior, given, start, TRUE_POSES[:1], settings=settings, score=score)
    assert float(found.poses[1, 1]) == pytest.approx(60, abs=3)


def test_masks_of_sampled_views():
    view = torch.ones(1, 3, 16, 16)
    view[..., 4:12, 4:12] = 0.3
    view[..., 7:9, 7:9] = 1.0  # a highlight, not a hole
    mask = object_masks(view)
    assert float(mask.sum()) == 64 and float(mask[0, 0, 8, 8]) == 1


# The driver ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(1)
    prior, images = exact_prior(elevation_bias=3.0)
    calls = []
    state = torch.get_rng_state()
    found = latentdem.reconstruct(
        list(images), prior=prior, settings=QUICK, progress=lambda *call: calls.append(call)
    )
    return found, calls, torch.equal(torch.get_rng_state(), state)


def test_reconstruct(result):
    found, calls, untouched = result
    assert untouched  # the global random state
    error = wrap_degrees(found.poses - TRUE_POSES)
    assert float(found.poses[0, 1]) == 0
    assert float(error[:, 1].abs().max()) < 8
    assert found.camera_to_world.shape == (3, 4, 4)
    assert found.novel_views.shape == (4, 3, SIDE, SIDE)
    assert 0 <= float(found.novel_views.min()) <= float(found.novel_views.max()) <= 1
    assert found.residual.shape == found.uncertainty.shape == (3,)
    assert found.render(found.poses).shape == (3, 3, SIDE, SIDE)
    shares = [share for _, share in calls]
    assert shares == sorted(shares) and shares[-1] == 1
    assert list(dict.fromkeys(phase for phase, _ in calls)) == ["poses", "views", "field", "mesh"]
    assert set(found.report["seconds_by_phase"]) == {"poses", "views", "field", "mesh"}
    assert found.report["network_evaluations"] > 0


def test_save_writes_everything(result, tmp_path):
    found = result[0]
    found.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    poses = json.loads((tmp_path / "out" / "poses.json").read_text())
    assert [view["name"] for view in poses["views"]] == ["view 1", "view 2", "view 3"]
    matrices = torch.tensor([view["camera_to_world"] for view in poses["views"]])
    torch.testing.assert_close(matrices, found.camera_to_world)
    focal = SIDE / 2 / np.tan(np.deg2rad(20))
    assert poses["intrinsics"] == pytest.approx([focal, focal, SIDE / 2, SIDE / 2], rel=1e-5)
    field = RadianceField.load(tmp_path / "out" / "field.safetensors")
    assert torch.equal(field.density, found.field.density)
    with Image.open(tmp_path / "out" / "turntable.webp") as turntable:
        assert turntable.n_frames > 10
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["history"][0]["phase"] == "poses"


def test_known_poses_are_kept_and_determine_the_result():
    prior, images = exact_prior()
    turned = TRUE_POSES[:2] + torch.tensor([0.0, 100.0, 0.0])
    runs = [
        latentdem.reconstruct(list(images[:2]), prior=prior, poses=turned, settings=QUICK, seed=3)
        for _ in range(2)
    ]
    torch.testing.assert_close(runs[0].poses, TRUE_POSES[:2])
    assert torch.equal(runs[0].field.density, runs[1].field.density)
    assert torch.equal(runs[0].novel_views, runs[1].novel_views)
    assert runs[0].report["margin"] is None and runs[0].uncertainty.tolist() == [0, 0]


def test_a_search_can_be_used_again(result):
    found = result[0]
    prior, images = exact_prior(elevation_bias=3.0)
    again = latentdem.reconstruct(
        list(images), prior=prior, settings=QUICK, estimate=found.estimate
    )
    assert torch.equal(again.poses, found.poses)
    assert again.report["network_evaluations"] < found.report["network_evaluations"]
    assert again.report["seconds_by_phase"]["views"] > 0
    assert "poses" not in again.report["seconds_by_phase"]
    with pytest.raises(ValueError, match="estimate must be of the same 2 views"):
        latentdem.reconstruct(
            list(images[:2]), prior=prior, settings=QUICK, estimate=found.estimate
        )


def test_one_view_with_its_pose():
    prior, images = exact_prior()
    found = latentdem.reconstruct([images[0]], prior=prior, poses=TRUE_POSES[:1], settings=QUICK)
    assert found.poses.shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": 1}, "at least two views of the object are needed, found 1"),
        ({"poses": torch.zeros(3, 3)}, r"poses must have shape \[K,3\] for K = 2 views"),
        ({"poses": torch.zeros(2, 3)}, "poses must be finite, their radii positive"),
        ({"elevation": 95.0}, "elevation must lie between -90 and 90 degrees, found 95"),
        ({"rounds": 0}, "rounds must be positive, found 0"),
        ({"masks": [torch.zeros(1, SIDE, SIDE)] * 2}, "view 1: the mask is empty"),
    ],
)
def test_bad_input(change, message):
    prior, images = exact_prior()
    count = change.pop("views", 2)
    with pytest.raises(ValueError, match=message):
        latentdem.reconstruct(list(images[:count]), prior=prior, settings=QUICK, **change)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SamplerSettings, {"restart": 1.0}, "restart must lie between 0 and 1"),
        (SamplerSettings, {"targets": 0}, "targets must be positive"),
        (ReconstructSettings, {"start": "best"}, "start must be one of grid, random, found 'best'"),
        (ReconstructSettings, {"novel_weight": -1}, "novel_weight must be >= 0"),
    ],
)
def test_bad_settings(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_rendering_may_not_move_poses_where_the_prior_forbids():
    prior, images = exact_prior()
    score = DenoisingScore(prior, prior.embed(images[:2]), QUICK.poses, 0)
    before = TRUE_POSES[:2] + torch.tensor([[0.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    assert torch.equal(believable_poses(score, before, TRUE_POSES[:2], 0.1), TRUE_POSES[:2])
    away = before + torch.tensor([[0.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
    assert torch.equal(believable_poses(score, before, away, 0.1), before)
    past = before + torch.tensor([[0.0, 0.0, 0.0], [0.0, -40.0, 0.0]])
    halfway = believable_poses(score, before, past, 0.1)
    assert float(halfway[1, 1]) == pytest.approx(56)


def test_contradictions_are_said_with_their_residual():
    names, settings = ["a.png", "b.png", "c.png"], ReconstructSettings()
    agree = torch.ones(3, 3)
    assert contradictions(names, torch.tensor([0.03, 0.05, 0.04]), agree, settings) == []
    (line,) = contradictions(names, torch.tensor([0.03, 0.2, 0.04]), agree, settings)
    assert line.startswith("b.png contradicts the others: the object differs from it by 0.200")
    stranger = agree.clone()
    stranger[2, :2] = stranger[:2, 2] = -1
    (line,) = contradictions(names, torch.tensor([0.03, 0.04, 0.05]), stranger, settings)
    assert line.startswith("c.png and the other views hardly explain each other (residual 0.050)")
    (line,) = contradictions(names[:2], torch.full((2,), 0.03), -agree[:2, :2], settings)
    assert line.startswith("a.png and b.png hardly explain each other")
    assert contradictions(names[:1], torch.tensor([0.5]), agree[:1, :1], settings) == []


# The command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny prior with random weights, and two pictures."""
    folder = tmp_path_factory.mktemp("objects")
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=16,
        in_channels=16,
        out_channels=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=4,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )
    prior = ObjectsPrior(
        build_autoencoder(8),
        denoiser,
        ViewEmbedder(8, 16, 16, 1),
        nn.Linear(20, 16),
        scheduler.alphas_cumprod,
        "v_prediction",
        torch.zeros(8, 1, 1),
        torch.ones(8, 1, 1),
    )
    save_objects_prior(folder / "prior.safetensors", prior, dict(scheduler.config))
    _, images = exact_prior()
    paths = []
    for k, image in enumerate(images[:2]):
        paths.append(folder / f"{k}.png")
        to_pil(image).resize((64, 64)).save(paths[-1])
    return folder / "prior.safetensors", paths


@pytest.fixture
def quick_command(monkeypatch):
    """The command with few steps."""
    module = importlib.import_module("latentdem.em.reconstruct")
    monkeypatch.setattr(module, "ReconstructSettings", lambda: QUICK)


def run(*arguments):
    return CliRunner().invoke(app, ["reconstruct", *map(str, arguments)])


def test_command(files, tmp_path, quick_command):
    prior, views = files
    output = tmp_path / "out"
    arguments = [*views, "-o", output, "--prior", prior, "--rounds", 1]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert {path.name for path in output.iterdir()} >= FILES - {"mesh.glb"}
    assert "azimuth" in done.output and "0.png" in done.output
    before = (output / "report.json").stat().st_mtime_ns
    again = run(*arguments)
    assert again.exit_code == 0 and "already done" in again.output
    assert (output / "report.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p, v, o: [v[0], "-o", o, "--prior", p], "at least two views"),
        (lambda p, v, o: [v[0], v[0], "-o", o, "--prior", p], "the same picture"),
        (lambda p, v, o: [v[0], "none.png", "-o", o, "--prior", p], "none.png: no such file"),
        (lambda p, v, o: [*v, "-o", o, "--prior", p, "--mask", v[0]], "one mask for each view"),
        (lambda p, v, o: [*v, "-o", o, "--prior", "none"], "no prior at none"),
        (lambda p, v, o: [*v, "-o", o, "--prior", p, "--rounds", 0], "rounds must be positive"),
    ],
)
def test_command_says_what_is_wrong(files, tmp_path, build, message):
    done = run(*build(*files, tmp_path / "out"))
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1


def test_command_help():
    text = run("--help").output
    for word in ("Examples", "front.png side.png", "--mask", "--elevation", "--rounds"):
        assert word in text


def test_undecided_azimuths_are_said():
    assert uncertain_views(["a", "b"], torch.tensor([0.0, 30.0])) == []
    (line,) = uncertain_views(["a", "b"], torch.tensor([0.0, 80.0]))
    assert line.startswith("b: its azimuth is uncertain by 80 degrees")
