"""Poses from the denoising loss, on a stand-in prior of known geometry."""

from dataclasses import replace

import pytest
import torch
from object_stand_in import TRUE_POSES, exact_prior

from latentdem.em.denoising_score import DenoisingScore, NormalEquations
from latentdem.em.poses import (
    azimuth_uncertainty,
    combine,
    estimate_poses,
    initial_poses,
    refine,
    score_grid,
    separated,
    settle_elevations,
    solve_step,
)
from latentdem.em.reconstruct_settings import PoseSettings
from latentdem.operators.pose import wrap_degrees

QUICK = PoseSettings(azimuth_step=30, grid_levels=(0.5,), levels=(0.5,), modes=2, iterations=3)


def make_score(views=2, bias=4.0, settings=QUICK, **options):
    prior, images = exact_prior(elevation_bias=bias)
    return DenoisingScore(prior, prior.embed(images[:views]), settings, 0, **options)


@pytest.fixture(scope="module")
def pair():
    score = make_score()
    return score, estimate_poses(score)


def test_grid_finds_a_turn_of_sixty_degrees():
    score = make_score()
    grid = score_grid(score)
    assert float(grid.azimuths[grid.pairs[0, 1, 0, 0].argmin()]) == 60
    # Elevations beyond the prior's range become its border, a known one stays.
    low, high = score.prior.camera.elevation
    assert float(grid.elevations.min()) >= low and float(grid.elevations.max()) <= high
    known = score_grid(make_score(elevation=20.0))
    assert known.elevations[0].tolist() == [20.0] * 3
    assert len(set(known.elevations[1].tolist())) == 3


def test_refinement_comes_within_a_few_degrees(pair):
    _, estimate = pair
    error = estimate.poses - TRUE_POSES[:2]
    assert float(error[:, 1].abs().max()) < 1.5
    # Only the difference of elevations shows; the embedder was wrong by 8 degrees in it.
    assert abs(float(error[1, 0] - error[0, 0])) < 3
    assert float(estimate.poses[0, 1]) == 0
    assert float(estimate.mode_losses[0]) == pytest.approx(estimate.loss)
    assert estimate.margin > 1
    assert 0 < float(estimate.uncertainty[1]) < 6
    assert float(estimate.uncertainty[0]) == 0


def test_elevations_are_settled_far_from_the_embedders():
    score = make_score(bias=20.0)
    start = initial_poses(score, torch.tensor([[0.0, 60.0]]))
    settled = settle_elevations(score, start)
    assert float(score.joint(settled)[0]) < float(score.joint(start)[0])
    gap = float(settled[0, 1, 0] - settled[0, 0, 0])
    assert abs(gap - (-10)) <= 10 < abs(float(start[0, 1, 0] - start[0, 0, 0]) - (-10))


def test_refinement_never_climbs():
    score = make_score()
    start = initial_poses(score, torch.tensor([[0.0, 75.0], [0.0, -120.0]]))
    before = score.joint(start)
    poses, after, _ = refine(score, start)
    assert bool((after <= before + 1e-4).all())
    torch.testing.assert_close(score.joint(poses), after)


def test_three_views_use_all_pairs():
    score = make_score(views=3, settings=replace(QUICK, elevation_offsets=()))
    grid = score_grid(score)
    hypotheses, losses = combine(grid, score.given.radius)
    angles = hypotheses[0, :, 1]
    assert float(wrap_degrees(angles - TRUE_POSES[:, 1]).abs().max()) <= 15
    # The best sum over all pairs, by trying every one.
    count = len(grid.azimuths)
    table = grid.pairs[:, :, 0, 0]
    a = torch.arange(count)
    total = table[0, 1][:, None] + table[0, 2][None] + table[1, 2][(a[None] - a[:, None]) % count]
    assert float(losses[0]) == pytest.approx(float(total.min()), rel=1e-5)


def test_progress_through_the_grid():
    settings = replace(QUICK, elevation_offsets=(35.0, 60.0))
    score, calls = make_score(views=3, settings=settings), []
    grid = score_grid(score, lambda done, total: calls.append((done, total)))
    # Some elevations coincide at the border, so that pairs differ in their points.
    assert len({len(heights.unique()) for heights in grid.elevations}) == 2
    (total,) = {total for _, total in calls}
    assert [done for done, _ in calls] == list(range(1, total + 1))


def test_losses_of_the_levels_add_up():
    score = make_score(settings=replace(QUICK, levels=(0.3, 0.6, 0.8), noises=2))
    parts = score.by_level()
    assert [int(part.timesteps[0]) for part in parts] == [799, 599, 300]
    near, far = TRUE_POSES[:1], TRUE_POSES[1:2]
    source, target = torch.tensor([0]), torch.tensor([1])
    added = sum(part.losses(source, target, near, far) for part in parts)
    torch.testing.assert_close(added, score.losses(source, target, near, far))


def test_a_shrinking_grid_sees_less_and_keeps_the_best():
    settings = replace(QUICK, grid_levels=(0.8, 0.5), grid_kept=1.0)
    whole, shrunk = (make_score(settings=replace(settings, grid_kept=k)) for k in (1.0, 0.25))
    full, grid = score_grid(whole), score_grid(shrunk)
    assert shrunk.evaluations < 0.7 * whole.evaluations
    assert int(grid.pairs[0, 1].argmin()) == int(full.pairs[0, 1].argmin())
    torch.testing.assert_close(grid.pairs[0, 1].min(), full.pairs[0, 1].min())
    # Nothing that was dropped ranks above what was kept.
    kept = torch.isclose(grid.pairs[0, 1], full.pairs[0, 1])
    assert 0.2 < float(kept.float().mean()) < 0.5
    assert float(grid.pairs[0, 1][~kept].min()) >= float(grid.pairs[0, 1][kept].min())


def test_a_lost_mode_is_left_where_it_is():
    start_angles = torch.tensor([[0.0, 70.0], [0.0, -120.0]])
    score = make_score(settings=replace(QUICK, give_up=1e-3))
    start = initial_poses(score, start_angles)
    poses, losses, _ = refine(score, start)
    best = int(score.joint(start).argmin())
    assert torch.equal(poses[1 - best], start[1 - best])
    assert not torch.equal(poses[best], start[best])
    torch.testing.assert_close(losses, score.joint(poses))


def test_combination_of_a_pair_is_exact():
    score = make_score(bias=20.0)
    grid = score_grid(score)
    poses, losses = combine(grid, score.given.radius)
    total = grid.pairs[0, 1] + (grid.single[0][:, None] + grid.single[1])[..., None]
    assert float(losses[0]) == pytest.approx(float(total.min()), rel=1e-6)
    e, f, a = (int(i) for i in torch.nonzero(total == total.min())[0])
    found = [grid.elevations[0, e], grid.elevations[1, f], wrap_degrees(grid.azimuths[a])]
    assert [float(v) for v in found] == [float(v) for v in (*poses[0, :, 0], poses[0, 1, 1])]
    # Its entries are the losses of these poses.
    zero, one = torch.tensor([0]), torch.tensor([1])
    ends = poses[:1, 0], poses[:1, 1]
    both = score.losses(zero, one, *ends) + score.losses(one, zero, *ends[::-1])
    torch.testing.assert_close(grid.pairs[0, 1, e, f, a], both[0], rtol=1e-4, atol=1e-4)


def test_same_result_every_time_and_alone(pair):
    score, estimate = pair
    again = estimate_poses(make_score())
    assert torch.equal(again.poses, estimate.poses)
    # A pose's loss does not depend on what else is scored, nor on further views.
    moved = torch.tensor([[0.0, 30.0, 2.5], [5.0, 60.0, 2.6], [0.0, -90.0, 2.5]])
    still = torch.tensor([[0.0, 0.0, 2.5]])
    zero, one = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    together = score.losses(zero, one, still.expand(3, 3), moved)
    alone = torch.cat([score.losses(zero[:1], one[:1], still, pose[None]) for pose in moved])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    with_third = make_score(views=3).losses(zero, one, still.expand(3, 3), moved)
    torch.testing.assert_close(with_third, together, rtol=1e-5, atol=1e-5)


def test_random_start_is_one_seeded_hypothesis():
    found = [estimate_poses(make_score(), start="random", seed=s) for s in (3, 3, 4)]
    assert torch.equal(found[0].poses, found[1].poses)
    assert not torch.equal(found[0].poses, found[2].poses)
    assert len(found[0].modes) == 1 and found[0].margin == float("inf")


def test_a_known_elevation_is_kept():
    estimate = estimate_poses(make_score(elevation=20.0))
    assert float(estimate.poses[0, 0]) == pytest.approx(20, abs=0.2)
    assert float(estimate.poses[1, 0]) == pytest.approx(10, abs=2)


def test_noise_and_global_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = make_score(), make_score()
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(torch.get_rng_state(), state)


def test_evidence_is_there_for_true_poses_only():
    score = make_score(views=3)
    right = score.evidence(TRUE_POSES)
    assert right.diagonal().tolist() == [0, 0, 0]
    off = ~torch.eye(3, dtype=torch.bool)
    assert float(right[off].min()) > 0
    wrong = TRUE_POSES.clone()
    wrong[1, 1] = -120
    table = score.evidence(wrong)
    assert float(table[0, 1]) < float(right[0, 1])
    assert float(table[0, 2]) == pytest.approx(float(right[0, 2]), rel=1e-4)


def test_normal_equations_are_those_of_the_loss():
    """Against autograd, for a residual that is linear in two poses."""
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(6, 7, generator=generator)
    poses = torch.randn(3, 3, generator=generator).requires_grad_()
    offset = torch.randn(7, generator=generator)

    def residual(p):
        return p[0] @ slopes[:3] + p[2] @ slopes[3:] + offset

    loss = 0.5 * residual(poses).square().sum()
    (gradient,) = torch.autograd.grad(loss, poses)
    hessian = torch.autograd.functional.hessian(
        lambda p: 0.5 * residual(p.reshape(3, 3)).square().sum(), poses.detach().flatten()
    )
    system = NormalEquations.zero(3, offset)
    system.add_pair(0, 2, slopes, residual(poses.detach()))
    torch.testing.assert_close(system.gradient, gradient.flatten())
    torch.testing.assert_close(system.matrix, hessian)


def test_steps_stay_in_their_trust_region():
    system = NormalEquations.zero(2, torch.zeros(1))
    system.matrix += 1e-6 * torch.eye(6)
    system.gradient += 1
    step = solve_step(system, 0.1)
    assert float(step[0, 1]) == 0  # the gauge
    assert 0 < float((step.abs() / torch.tensor([10.0, 15.0, 0.2])).max()) <= 1 + 1e-5


def test_modes_lie_apart_over_the_wrap():
    azimuths = torch.tensor([[0.0, 178.0], [0.0, -178.0], [0.0, 90.0], [0.0, 100.0]])
    assert separated(azimuths, torch.tensor([0.0, 1.0, 3.0, 2.0]), 3, 30.0) == [0, 3]


def test_two_equal_modes_are_uncertain_by_half_their_distance():
    modes = torch.zeros(2, 2, 3)
    modes[0, 1, 1], modes[1, 1, 1] = 170.0, -170.0
    spread = azimuth_uncertainty(modes, torch.zeros(2), torch.zeros(2, 3))
    assert spread.tolist() == pytest.approx([0, 20 * 0.5**0.5], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"azimuth_step": 50}, "azimuth_step must divide 360, found 50"),
        ({"levels": (0.5, 1.2)}, "levels must lie between 0 and 1"),
        ({"levels": ()}, "levels must lie between 0 and 1"),
        ({"modes": 0}, "modes must be positive, found 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PoseSettings(**options)
