"""The rows of the objects suite, with a prior that knows its object exactly."""

import pytest
import torch
from object_stand_in import TRUE_POSES, exact_prior

from latentdem import evaluate_object_methods
from latentdem.em.reconstruct_settings import (
    PoseSettings,
    ReconstructSettings,
    SamplerSettings,
)
from latentdem.evaluate_object_methods import ROWS, Case, build_methods
from latentdem.evaluate_objects import measure

QUICK = ReconstructSettings(
    rounds=1,
    resolution=16,
    iterations=30,
    samples_per_ray=24,
    poses=PoseSettings(azimuth_step=30, levels=(0.5,), modes=2, iterations=2),
    sampler=SamplerSettings(targets=4, steps=4),
)
DIFFUSION = [row for row in ROWS if row != "feed-forward"]


@pytest.fixture(scope="module")
def outcomes():
    prior, _ = exact_prior()
    color, opacity, _ = prior.scene.render(TRUE_POSES, fov=40.0, image_size=32, samples_per_ray=32)
    straight = ((color - (1 - opacity)) / opacity.clamp_min(1e-3)).clamp(0, 1)
    images = (torch.cat((straight, opacity), 1) * 255).round().to(torch.uint8)
    case = Case("blobs", 0, images[:2], TRUE_POSES[:2], images[2:], TRUE_POSES[2:],
                torch.zeros(0, 3))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_object_methods, "load_objects_prior", lambda path: prior)
        methods = build_methods(DIFFUSION, settings=QUICK)
    return case, {row: method(case) for row, method in methods.items()}


def test_every_row_gives_a_field_and_samples(outcomes):
    case, found = outcomes
    assert list(found) == DIFFUSION
    for row, outcome in found.items():
        figures, _ = measure(case, outcome, 40.0)
        assert len(outcome.poses) == (1 if row == "one view" else 2), row
        assert float(outcome.poses[0, 1]) == 0, row
        assert figures["psnr_sampled"] > 10, row
        assert figures["iou"] > 0.2, row


def test_poses_are_those_given_or_found(outcomes):
    case, found = outcomes
    assert torch.allclose(found["true poses"].poses, case.poses)
    assert torch.allclose(found["one view"].poses, case.poses[:1], atol=1e-3)
    figures, _ = measure(case, found["grid"], 40.0)
    assert figures["rotation"][0] < 15
    # The M-steps move them.
    assert not torch.equal(found["grid"].poses, found["grid + EM + rendering"].poses)


def test_samples_at_true_poses_are_the_object(outcomes):
    case, found = outcomes
    figures, _ = measure(case, found["true poses"], 40.0)
    assert figures["psnr_sampled"] > 25


def test_rows_share_one_search_and_count_its_seconds(outcomes):
    _, found = outcomes
    shared = {row: outcome.shared_seconds for row, outcome in found.items()}
    assert shared["grid"] == 0
    assert shared["grid + EM"] == shared["grid + EM + rendering"] > 0
    assert shared["random start"] == shared["true poses"] == shared["one view"] == 0
