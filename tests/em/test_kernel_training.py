"""Training of the kernel prior: evidence, collecting it, and learning from it."""

import hashlib

import numpy as np
import pytest
import torch
from em.test_blur_model import scene
from em.test_deblur import invoke
from em.test_natural_training import pictures
from PIL import Image
from safetensors.torch import load_file

import latentdem
import latentdem_ext as ext
from latentdem.metrics import maximum_normalized_correlation
from latentdem.operators.blur import BlurModel, EdgeStepSettings
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors.kernel import KernelDenoiserNet, kernel_evidence, load_kernel_prior
from latentdem.training import answers, data, kernel_denoiser, packaged
from latentdem.training.answers import (
    Answers,
    AnswerSampler,
    collect_answers,
    load_answers,
    mean_cosine,
)


def fit(scale=1.0, before=None):
    kernel = random_motion_kernel(11, seed=3)
    sharp = scale * scene(128)
    observed = ext.blur_conv2d(sharp, kernel, boundary="valid")
    model = BlurModel(observed, kernel_size=11, noise_std=0.005)
    image = model.padded.clone()
    model.crop(image).copy_(sharp[..., 5:-5, 5:-5])
    before = kernel if before is None else before
    return model, kernel, model.fit_edges(image.mean(1, keepdim=True), before, weight=6.0)


def test_evidence_holds_the_kernel_in_the_images_place():
    _, kernel, found = fit()
    evidence = found.evidence()
    assert evidence.shape == (1, 5, 11, 11)
    # In its place: no shift is searched.
    assert float(torch.cosine_similarity(evidence[0, 0].flatten(), kernel.flatten(), 0)) > 0.97
    assert float(evidence[:, 0].min()) >= 0
    assert float(evidence[:, 1].min()) < 0
    assert float(evidence[:, 0].max()) == pytest.approx(1)
    assert torch.allclose(evidence[:, 4:], kernel / kernel.max())


def test_evidence_does_not_know_the_exposure():
    evidence, darker = (fit(scale)[2].evidence() for scale in (1.0, 0.4))
    assert torch.allclose(evidence, darker, atol=2e-3)


def test_flat_pictures_have_evidence_of_nothing():
    nothing = kernel_evidence(torch.zeros(1, 9, 9), torch.zeros(1, 5, 5), torch.ones(1, 1, 5, 5))
    assert torch.isfinite(nothing).all()
    assert torch.isfinite(load_kernel_prior()(nothing[:, :1], nothing)).all()


def test_evidence_begins_with_no_say():
    torch.manual_seed(1)
    net = KernelDenoiserNet()
    evidence = torch.rand(2, 5, 13, 13)
    evidence[:, :1] /= evidence[:, :1].amax((-2, -1), keepdim=True)
    assert torch.allclose(net(evidence[:, :1]), net(evidence[:, :1], evidence), atol=1e-7)
    net.fine.bias.data.fill_(0.3)
    assert not torch.allclose(net(evidence[:, :1]), net(evidence[:, :1], evidence))


@pytest.mark.parametrize("size", [3, 9, 33, 65])
def test_network_takes_any_size(size):
    net = load_kernel_prior()
    answer = net(torch.rand(2, 1, size, size), torch.rand(2, 5, size, size))
    assert answer.shape == (2, 1, size, size)
    assert torch.allclose(answer.sum((-2, -1)), torch.ones(2, 1), atol=1e-5)
    assert answer.min() >= 0


def test_packaged_network_answers_a_wrong_before():
    wrong = random_motion_kernel(11, seed=8)
    model, kernel, found = fit(before=wrong)
    model.kernel_prior = load_kernel_prior()
    settled = model.settle(found, EdgeStepSettings(momentum=0))
    assert maximum_normalized_correlation(settled, kernel) > 0.9


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(answers, "BLURS_PER_SHARD", 2)
    monkeypatch.setattr(answers, "SIZES", (9,))
    monkeypatch.setattr(answers, "LARGE_SIZES", (13,))
    monkeypatch.setattr(answers, "CROPS", {False: (48, 56), True: (56, 64)})
    monkeypatch.setattr(answers, "SHARE_TO_EM", 1.0)
    for module in (answers, kernel_denoiser):
        monkeypatch.setattr(module, "load_images", lambda folder, split: pictures())


def test_collecting_goes_on_where_it_was(small, tmp_path):
    priors = latentdem.load_prior(), latentdem.load_kernel_prior()
    collect_answers(tmp_path, tmp_path / "a", *priors, split="train", shards=2)
    paths = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in paths] == [f"train-000{i}.safetensors" for i in (0, 1)]
    first = load_file(paths[0])
    paths[0].unlink()
    stamp = paths[1].stat().st_mtime_ns
    collect_answers(tmp_path, tmp_path / "a", *priors, split="train", shards=2)
    again = load_file(paths[0])
    assert paths[1].stat().st_mtime_ns == stamp
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for size, found in load_answers(tmp_path / "a", "train").items():
        count = len(found.truth)
        assert found.evidence.shape == (count, 5, size, size)
        assert torch.allclose(found.truth.sum((-2, -1)), torch.ones(count, 1), atol=2e-2)
        assert found.evidence[:, 0].amax((-2, -1)).min() == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="no answers of the validation photographs"):
        load_answers(tmp_path / "a", "validation")


def made_up(count=40, size=9):
    truth = torch.cat([random_motion_kernel(size, seed=s) for s in range(count)])
    evidence = (truth / truth.amax((-2, -1), keepdim=True)).expand(-1, 5, -1, -1).clone()
    evidence[:, :4] += 0.2 * torch.randn(count, 4, size, size)
    return Answers(evidence, truth)


def test_batches_turn_evidence_and_truth_together():
    sampler = AnswerSampler({9: made_up(), 33: made_up(size=33)}, seed=0)
    hidden = 0
    for _ in range(40):
        evidence, truth = sampler.batch(16)
        assert evidence.shape[-1] == truth.shape[-1]
        assert len(evidence) == (32 if truth.shape[-1] == 9 else 10)
        if torch.equal(evidence[:, 4], evidence[:, 0]):
            hidden += 1
        else:
            peaks = truth.amax((-2, -1), keepdim=True)
            assert torch.allclose(evidence[:, 4:], truth / peaks, atol=1e-5)
    assert 1 <= hidden <= 15


def test_training_learns_and_goes_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_denoiser, "load_answers", lambda folder, split: {9: made_up()})
    monkeypatch.setattr(kernel_denoiser.SyntheticSampler, "SIZES", (9,))
    monkeypatch.setattr(packaged, "fetch", lambda folder, sources: None)
    asked = []
    monkeypatch.setattr(packaged, "collect_answers", lambda *a, **k: asked.append(k["split"]))
    start = KernelDenoiserNet()
    before = mean_cosine(start, {9: made_up()})[1]
    output = tmp_path / "kernel.safetensors"
    packaged.make_kernel_prior(
        tmp_path, tmp_path / "runs", output, minutes=9, shards=1, refine_minutes=0.15,
        prior=latentdem.load_prior(), start=start,
    )  # fmt: skip
    assert asked == ["train", "validation"]
    assert not (tmp_path / "runs" / "kernel.safetensors").exists()  # the first stage was left out
    found = load_kernel_prior(output)
    assert mean_cosine(found, {9: made_up()})[1] > before + 0.02
    # Halfway between where it began and where training ended.
    ended = load_file(tmp_path / "runs" / "kernel_refined.safetensors")["ema.tail.bias"]
    halfway = (start.tail.bias.detach() + ended) / 2
    assert torch.allclose(found.tail.bias, halfway, atol=1e-3)


def test_cache_of_pictures_is_whole_or_not_there(tmp_path, monkeypatch):
    source = data.Source("package", "a.png", hashlib.sha256(b"").hexdigest(), "train", 1.0)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)

    def dies(self, path, *arguments):
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    image = Image.fromarray(picture)
    monkeypatch.setattr(data, "_read_bytes", lambda folder, source: b"")
    monkeypatch.setattr(data, "_decode", lambda found: image)
    monkeypatch.setattr(data, "shrink_until_sharp", lambda found: found)
    real = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        data.load_images(tmp_path, "train", sources=[source])
    monkeypatch.setattr(Image.Image, "save", real)
    ((found, _),) = data.load_images(tmp_path, "train", sources=[source])
    assert torch.equal(found, torch.from_numpy(picture).permute(2, 0, 1))


def test_start_must_be_a_kernel_prior(tmp_path):
    result = invoke("train-kernel-prior", "--start", tmp_path / "none.safetensors")
    assert result.exit_code == 1
    assert "no kernel prior at" in result.output.replace("\n", " ")
