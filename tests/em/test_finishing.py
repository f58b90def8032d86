"""The last step: its network, where it is asked, and how it is trained."""

import numpy as np
import pytest
import torch
from em.test_blur_model import scene
from em.test_deblur import invoke
from em.test_natural_training import pictures
from safetensors.torch import load_file

import latentdem
import latentdem_ext as ext
from latentdem.em.finish import finish
from latentdem.em.settings import ProxSettings
from latentdem.operators.blur import BlurModel
from latentdem.operators.motion import random_motion_kernel
from latentdem.operators.super_resolution import SuperResolutionModel
from latentdem.priors.finishing import Candidates, FinishingNet, load_finishing, save_finishing
from latentdem.training import finishing as training
from latentdem.training.common import TrainingPlan


def example(noise_std=0.01, size=9):
    kernel = random_motion_kernel(size, seed=3)
    sharp = scene(96)
    observed = ext.blur_conv2d(sharp, kernel, boundary="valid")
    torch.manual_seed(0)
    observed = observed + noise_std * torch.randn_like(observed)
    half = size // 2
    model = BlurModel(observed, kernel_size=size, noise_std=noise_std)
    return model, kernel, sharp[..., half:-half, half:-half]


def candidates(height=21, width=30):
    images = [torch.rand(1, 3, height, width) for _ in range(5)]
    return Candidates(*images, torch.rand(1, 1, height, width), 0.02)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (21, 30)])
def test_an_untrained_network_changes_nothing(size):
    given = candidates(*size)
    assert torch.equal(FinishingNet()(given.stack()), given.base)


def test_the_stack_is_in_the_order_that_is_told():
    given = candidates()
    stack = given.stack()
    assert stack.shape == (1, 17, 21, 30)
    images = (given.base, given.estimate, given.sparse, given.detail, given.observation)
    for index, image in enumerate(images):
        assert torch.equal(stack[:, 3 * index : 3 * index + 3], image)
    assert torch.equal(stack[:, 15:16], given.deviation)
    assert torch.equal(stack[:, 16:], torch.full((1, 1, 21, 30), 0.02))


def test_padding_reaches_only_the_border():
    network = load_finishing()
    stack = candidates(64, 64).stack()
    whole, part = network(stack), network(stack[..., :63])
    assert part.shape == (1, 3, 64, 63)
    assert torch.allclose(whole[..., :24], part[..., :24], atol=2e-2)


class _Spy(FinishingNet):
    def forward(self, stack):
        self.stack = stack
        return stack[:, :3] + 1


def test_the_network_sees_what_the_last_step_has():
    model, kernel, _ = example()
    images = torch.stack([model.padded[0], model.padded[0] + 0.1])
    spy, settings = _Spy(), ProxSettings()
    with torch.no_grad():
        without = finish(model, images, kernel, settings)
        found = finish(model, images, kernel, settings, spy)
    assert torch.allclose(found, without + 1)
    assert torch.equal(spy.stack[:, :3], without)
    assert torch.allclose(spy.stack[:, 3:6], images.mean(0, keepdim=True))
    assert torch.allclose(spy.stack[:, 12:15], model.padded)
    assert torch.allclose(spy.stack[:, 15], torch.tensor(0.05), atol=1e-6)
    # What the data say: simulated, it is the observation.
    detail = spy.stack[:, 9:12]
    misfit = model.residual_variance(detail, kernel) ** 0.5
    assert misfit < model.residual_variance(without, kernel) ** 0.5 + 1e-4


def test_no_other_prior_no_network():
    model, kernel, _ = example()
    images = model.padded
    assert torch.equal(
        finish(model, images, kernel, ProxSettings(sparse_share=0), _Spy()),
        finish(model, images, kernel, ProxSettings(sparse_share=0)),
    )
    small = SuperResolutionModel(torch.rand(1, 3, 16, 16), scale=2, kernel_size=5, noise_std=0.01)
    kernel = small.start_parameters()
    assert torch.equal(
        finish(small, small.padded, kernel, ProxSettings(), _Spy()),
        finish(small, small.padded, kernel, ProxSettings()),
    )


def test_the_packaged_network_mends_ringing():
    """A restoration with the true kernel comes nearer to the truth."""
    model, kernel, truth = example(noise_std=0.02)
    with torch.no_grad():
        images = model.proximal(model.padded, kernel, ratio=0.05)
        without, found = (
            model.crop(finish(model, images, kernel, ProxSettings(), network))
            for network in (None, load_finishing())
        )
    inner = (..., slice(8, -8), slice(8, -8))
    errors = [float((x - truth)[inner].square().mean()) for x in (without, found)]
    assert errors[1] < errors[0]


def test_deblur_asks_it_unless_it_is_told_not_to(monkeypatch):
    _, kernel, _ = example()
    observed = ext.blur_conv2d(scene(64), kernel, boundary="valid")
    asked = []
    true_forward = FinishingNet.forward

    def forward(self, stack):
        asked.append(stack.shape)
        return true_forward(self, stack)

    monkeypatch.setattr(FinishingNet, "forward", forward)
    for finishing in (True, False):
        settings = ProxSettings(steps=1, chains=1, finishing=finishing)
        latentdem.deblur(observed, kernel=kernel, noise_std=0.01, settings=settings)
        assert len(asked) == 1


def test_loading_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="latentdem train-finishing"):
        load_finishing(tmp_path / "none.safetensors")
    path = tmp_path / "text.safetensors"
    path.write_text("no weights")
    with pytest.raises(ValueError, match="not a finishing network"):
        load_finishing(path)
    save_finishing(path, FinishingNet())
    assert not load_finishing(path).training


def test_moving_by_a_part_of_a_pixel():
    picture = scene(64)
    assert torch.allclose(training.move(picture, 0, 0), picture, atol=1e-6)
    moved = training.move(picture, 2, -1)
    assert torch.allclose(moved[..., 8:-8, 8:-8], picture[..., 6:-10, 9:-7], atol=1e-5)
    back = training.move(training.move(picture, 0.3, 0.4), -0.3, -0.4)
    assert float((back - picture)[..., 8:-8, 8:-8].abs().mean()) < 0.01


def test_batches_turn_candidates_and_truth_together():
    truth = torch.rand(3, 40, 48)
    blur = torch.cat([truth] * 5 + [truth[:1], torch.full((1, 40, 48), 0.5), truth]).half()
    stack, target = training.CandidateSampler([blur], seed=1, side=32).batch(6)
    assert stack.shape == (6, 17, 32, 32)
    assert all(torch.equal(stack[:, i : i + 3], target) for i in (0, 3, 6, 9, 12))
    assert len({float(each.sum()) for each in target}) > 1


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "BLURS_PER_SHARD", 2)
    monkeypatch.setattr(training, "SIZES", (9,))
    monkeypatch.setattr(training, "OBSERVED", {9: 40})
    monkeypatch.setattr(training, "JPEG_SHARE", 0.5)
    monkeypatch.setattr(training, "load_images", lambda folder, split: pictures())
    monkeypatch.setattr(training, "fetch", lambda folder, manifest: None)
    monkeypatch.setattr(training, "CandidateSampler", lambda blurs, seed: _Sampler(blurs, seed, 16))
    monkeypatch.setattr(
        training, "TrainingPlan", lambda **own: TrainingPlan(**own | {"report_every": 1})
    )


_Sampler = training.CandidateSampler


def test_the_command_collects_trains_and_goes_on(small, tmp_path):
    output = tmp_path / "own.safetensors"
    arguments = ["train-finishing", "-o", str(output), "--data", str(tmp_path), "--runs",
                 str(tmp_path / "runs"), "--shards", "1", "--minutes", "0.02"]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "held-out PSNR" in result.output
    shard = tmp_path / "runs" / "candidates" / "train-0000.safetensors"
    blurs = load_file(shard)
    assert [tuple(blur.shape) for blur in blurs.values()] == [(1, 20, 40, 40)] * 2
    assert all(np.isfinite(blur.float().numpy()).all() for blur in blurs.values())
    assert isinstance(load_finishing(output), FinishingNet)
    stamp = shard.stat().st_mtime_ns
    assert "resumed at step" in invoke(*arguments).output
    assert shard.stat().st_mtime_ns == stamp
