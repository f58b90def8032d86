"""The packaged objects prior on two pictures of an object that it was not trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentdem.operators.pose import relative_pose
from latentdem.priors.objects import PACKAGED_OBJECTS, load_objects_prior
from latentdem.views import load_views

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"
# What the pictures were drawn with.
POSES = torch.tensor([[20.0, 0.0, 2.5], [28.0, 50.0, 2.6]])


@pytest.fixture(scope="module")
def prior():
    return load_objects_prior()


@pytest.fixture(scope="module")
def views():
    return load_views([EXAMPLES / "object_front.png", EXAMPLES / "object_side.png"]).images


def test_size_and_card():
    assert PACKAGED_OBJECTS.stat().st_size < 30e6
    card = PACKAGED_OBJECTS.with_suffix(".md").read_text()
    for word in ("**Data**", "**Command**", "**Figures**", "**Limits**", "Licence"):
        assert word in card


def test_round_trip(prior, views):
    with torch.no_grad():
        error = (prior.decode(prior.encode(views)).clamp(0, 1) - views).square().mean()
    assert -10 * torch.log10(error) > 25


def losses(prior, views, turns):
    """Loss of the second view given the first, turned about z by ``turns`` from the truth."""
    timesteps = torch.tensor([600, 700, 800, 900])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 8, 16, 16, generator=generator)
    abar = prior.alphas_cumprod[timesteps][:, None, None, None]
    found = []
    with torch.no_grad():
        given = replace(prior.embed(views), elevation=POSES[:, 0], radius=POSES[:, 2])
        noisy = abar.sqrt() * given.latents[1] + (1 - abar).sqrt() * noise
        for turn in turns:
            pose = relative_pose(POSES[0], POSES[1] + torch.tensor([0.0, turn, 0.0]))
            _, epsilon = prior.predict(
                noisy, timesteps, given[torch.zeros(4, dtype=torch.long)], pose.expand(4, 3)
            )
            found.append(float((epsilon - noise).square().sum()))
    return found


def test_the_true_turn_explains_the_second_view_best(prior, views):
    true, *others = losses(prior, views, [0, 60, 120, 180, -60, -120])
    assert true < min(others)


def test_the_given_view_helps(prior, views):
    """Zeros in its place are what the prior was trained to take for no view at all."""
    timesteps = torch.tensor([800, 900])
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 8, 16, 16, generator=generator)
    abar = prior.alphas_cumprod[timesteps][:, None, None, None]
    with torch.no_grad():
        given = replace(prior.embed(views), elevation=POSES[:, 0], radius=POSES[:, 2])[
            torch.zeros(2, dtype=torch.long)
        ]
        noisy = abar.sqrt() * prior.encode(views)[1] + (1 - abar).sqrt() * noise
        pose = relative_pose(POSES[0], POSES[1]).expand(2, 3)
        _, seen = prior.predict(noisy, timesteps, given, pose)
        hidden = replace(
            given,
            latents=torch.zeros_like(given.latents),
            tokens=torch.zeros_like(given.tokens),
        )
        _, alone = prior.predict(noisy, timesteps, hidden, torch.zeros(2, 3))
    errors = [(e - noise).square().sum((1, 2, 3)) for e in (seen, alone)]
    assert (errors[0] < errors[1]).all()
