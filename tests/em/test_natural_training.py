"""Training of the natural-image prior: crops, blurred twins, labels, and what is kept apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image, ImageEnhance, UnidentifiedImageError

import latentdem
from latentdem.io import to_pil
from latentdem.priors import latent as latent_priors
from latentdem.priors.latent import LatentPrior, network_multiple, save_prior
from latentdem.training import autoencoder as autoencoders
from latentdem.training import data, diffusion, packaged

CPU = torch.device("cpu")


def pictures(count: int = 2, size: int = 400) -> list[tuple[torch.Tensor, float]]:
    """Smooth noise with hard edges: flat on the left, busy on the right."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        coarse = torch.rand(1, 3, size // 16, size // 16, generator=generator)
        image = F.interpolate(coarse, size=(size, size), mode="nearest")[0]
        image[:, :, : size // 3] = 0.5
        found.append(((image * 255).to(torch.uint8), 1.0))
    return found


@pytest.fixture
def tiny(monkeypatch):
    """Networks of a few thousand weights, and their counts, in place of the real ones."""

    def build_autoencoder(channels: int = diffusion.LATENT_CHANNELS) -> AutoencoderKL:
        return AutoencoderKL(
            in_channels=12, out_channels=12, block_out_channels=(8, 8), latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        )  # fmt: skip

    def build_unet(classes: int | None = len(diffusion.CLASSES)) -> UNet2DModel:
        channels = diffusion.LATENT_CHANNELS
        return UNet2DModel(
            in_channels=channels, out_channels=channels, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            layers_per_block=1, norm_num_groups=4, add_attention=False, num_class_embeds=classes,
        )  # fmt: skip

    monkeypatch.setattr(autoencoders, "build_autoencoder", build_autoencoder)
    monkeypatch.setattr(diffusion, "build_unet", build_unet)
    for table, count in ((diffusion.POOL, 3), (diffusion.HELD_OUT_PAIRS, 2), (diffusion.BATCH, 1)):
        monkeypatch.setitem(table, "cpu", count)
    torch.manual_seed(0)
    return build_autoencoder, build_unet


def test_difference_hash_survives_what_it_should():
    image = to_pil(pictures(1)[0][0].float() / 255)
    original = data.difference_hash(image)
    versions = [
        image.resize((150, 150), Image.Resampling.LANCZOS),
        ImageEnhance.Brightness(image).enhance(0.8),
    ]
    assert all(data.hash_distance(original, data.difference_hash(v)) <= 6 for v in versions)
    turned = data.difference_hash(image.transpose(Image.Transpose.ROTATE_90))
    assert data.hash_distance(original, turned) > 12
    assert data.hash_distance(0b1011, 0b0001) == 2


def test_no_training_picture_looks_like_a_test_photograph():
    """By difference hashes of the photographs and their mirror images, not only by content."""
    from skimage import data_dir
    from sklearn.datasets import load_sample_images

    examples = Path(latentdem.__file__).parents[1] / "examples"
    paths = [*Path(data_dir).glob("*.*"), *examples.glob("*.jpg")]
    paths += [Path(name) for name in load_sample_images().filenames]
    # A page of text and a colour ramp: their hashes are nearly empty, and match any smooth picture.
    plain = ("page.png", "multipage.tif", "color.png")
    test = {}
    for path in paths:
        if path.name in plain:
            continue
        try:
            image = data._decode(path.read_bytes())
        except UnidentifiedImageError:  # arrays and multispectral scans
            continue
        for version in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            test[data.difference_hash(version)] = path.name
    assert len(test) > 20
    sources = data.read_manifest()
    held_out = {int(s.dhash, 16): s.path for s in sources if s.split == "validation"}
    for source in sources:
        assert len(source.dhash) == 16
        for value, name in (test | held_out).items():
            if name != source.path:
                distance = data.hash_distance(int(source.dhash, 16), value)
                assert distance > 10, (source.path, name)


def test_members_of_resource_files(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.rcc").write_bytes(b"0123456789")
    source = data.Source("package", "a.rcc@3+4", "", "train", 1.0)
    assert data._read_bytes(tmp_path, source) == b"3456"
    manifest = json.loads(data.MANIFEST.read_text())
    assert {entry["package"] for entry in manifest["files"]} == set(manifest["licences"])


def test_bank_draws_what_is_in_the_pictures():
    images = pictures(1)
    bank = data.PictureBank(images, CPU, seed=0)
    crops = bank.crops(64, 48)
    assert crops.shape == (64, 3, 48, 48)
    assert crops.dtype == torch.uint8
    # Two scales of one picture: its values, and means of four of them at the edges.
    assert set(crops[:, :, 24, 24].flatten().tolist()) & set(images[0][0].flatten().tolist())
    flat = (crops.float().flatten(1).std(1) < 1).float().mean()
    assert float(flat) < 0.15  # a third of the picture is flat
    again = data.PictureBank(images, CPU, seed=0).crops(64, 48)
    assert torch.equal(crops, again)
    batch = bank.batch(8, 48)
    assert float(batch.min()) >= -1
    assert float(batch.max()) <= 1
    assert batch.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="no picture is as large as the crops, 500 pixels"):
        bank.crops(1, 500)


def test_bank_reads_rows_and_columns_in_order():
    """An image of coordinates: every crop is a window of it, up to flips, turns, permutations."""
    size = 96
    ramp = torch.arange(size, dtype=torch.uint8)
    zero = torch.zeros(size, size, dtype=torch.uint8)
    image = torch.stack([ramp[:, None].expand(size, size), ramp.expand(size, size), zero])
    for crop in data.PictureBank([(image, 1.0)], CPU, seed=1).crops(40, 32).long():
        dy = (crop[:, 1:] - crop[:, :-1]).flatten(1)
        dx = (crop[:, :, 1:] - crop[:, :, :-1]).flatten(1)
        assert sorted(dy.float().std(1).tolist()) == [0, 0, 0]
        assert sorted(dy.abs().amax(1).tolist()) == [0, 0, 1]
        assert sorted(dx.abs().amax(1).tolist()) == [0, 0, 1]


def test_blurred_twins():
    kernels = diffusion.blur_kernels(6, seed=2)
    assert kernels.shape == (6, 25, 25)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(6))
    assert float(kernels.max()) <= 0.4
    images = torch.rand(6, 3, 40, 56)
    blurred = diffusion.blur_tiles(images, kernels)
    padded = F.pad(images, (12,) * 4, mode="circular")
    for image, kernel, found in zip(padded, kernels, blurred, strict=True):
        expected = F.conv2d(image[:, None], kernel.flip(0, 1)[None, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pool_of_latents(tiny):
    autoencoder = tiny[0]()
    pool = diffusion.LatentPool(pictures(), autoencoder, 5, CPU, seed=4)
    assert pool.latents.shape == (2, 5, diffusion.LATENT_CHANNELS, 64, 64)
    assert pool.filled == 0
    before = pool.latents.clone()
    pool.refresh(2)
    assert pool.filled == 2
    assert torch.equal(pool.latents[:, 2:], before[:, 2:])
    assert not torch.equal(pool.latents[:, :2], before[:, :2])
    crops, labels = pool.batch(400, 16)
    assert crops.shape == (400, diffusion.LATENT_CHANNELS, 16, 16)
    shares = labels.bincount(minlength=3) / 400
    assert (shares - torch.tensor([0.585, 0.315, 0.1])).abs().max() < 0.1
    whole, _ = pool.batch(1, 64)
    assert any(torch.equal(whole[0], tile.float()) for tile in pool.latents.flatten(0, 1))


class Knowing(torch.nn.Module):
    """Predicts the right velocity of sharp and of blurred latents only under their own label."""

    def __init__(self, pairs: torch.Tensor, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.pairs, self.scheduler = pairs, scheduler

    def forward(self, noisy, timesteps, class_labels):
        signal = self.scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        spread = (1 - signal**2).sqrt()
        truth = self.pairs[int(class_labels[0])]
        noise = (noisy - signal * truth) / spread
        return type("Output", (), {"sample": signal * noise - spread * truth})()


def test_pairs_are_ranked_by_the_labels():
    pairs = torch.randn(2, 3, 2, 8, 8)
    scheduler = DDPMScheduler(**diffusion.SCHEDULER)
    losses, share, shares = diffusion.rank_pairs(Knowing(pairs, scheduler), scheduler, pairs)
    assert max(losses) < 1e-6
    assert share == 1
    assert shares == [1] * 6
    _, share, _ = diffusion.rank_pairs(Knowing(pairs.flip(0), scheduler), scheduler, pairs)
    assert share == 0


def test_noise_in_the_latents_shows():
    torch.manual_seed(0)
    model = autoencoders.build_autoencoder()
    images = [torch.rand(1, 3, 64, 96) * 2 - 1]
    clean = autoencoders.mean_psnr(model, images)
    assert autoencoders.noisy_psnr(model, images, noise=0.0) == pytest.approx(clean, abs=1e-4)
    noisy = autoencoders.noisy_psnr(model, images, noise=3.0)
    assert np.isfinite(noisy) and abs(noisy - clean) > 1e-3


@pytest.mark.parametrize(("shift", "worse"), [(0, True), (2, False)])
def test_seams_are_seen(monkeypatch, shift, worse):
    """An error that is constant in blocks of 4 x 4 pixels, in and out of step with the latents'."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.rand(1, 3, 17, 17, generator=generator).repeat_interleave(4, 2)
    error = steps.repeat_interleave(4, 3)[..., shift : shift + 64, shift : shift + 64]
    image = torch.zeros(1, 3, 64, 64)
    found = (image + error + 0.01 * torch.rand(image.shape, generator=generator), torch.zeros(()))
    monkeypatch.setattr(autoencoders, "reconstruct", lambda model, x, sample: found)
    ratio = autoencoders.seam_ratio(torch.nn.Identity(), [image])
    assert (ratio > 5) if worse else (ratio < 0.2)


def test_make_prior(tiny, tmp_path, monkeypatch):
    """The whole command with tiny networks: labels, sizes and calibration are in the file."""
    for module in (autoencoders, diffusion):
        monkeypatch.setattr(module, "load_images", lambda folder, split: pictures())
    monkeypatch.setattr(packaged, "fetch", lambda folder, sources: None)
    output = tmp_path / "prior.safetensors"
    packaged.make_prior(
        tmp_path, tmp_path, output, autoencoder_minutes=1e-3, diffusion_minutes=1e-3, device=CPU
    )
    prior = latentdem.load_prior(output)
    assert prior.classes == diffusion.CLASSES
    assert prior.multiple == 8
    assert len(prior.calibration_rmse) == 8
    assert torch.isfinite(prior.calibration_rmse).all()
    noisy = torch.randn(2, diffusion.LATENT_CHANNELS, 8, 8)
    answers = {label: prior.predict(noisy, 300, label)[0] for label in prior.classes}
    assert torch.equal(prior.predict(noisy, 300)[0], answers["sharp"])
    assert not torch.equal(answers["sharp"], answers["blurred"])
    with pytest.raises(ValueError, match="label 'dull' is not one of the prior's: sharp, blurred"):
        prior.predict(noisy, 300, "dull")
    # The labels outlive loading and saving.
    again = tmp_path / "again.safetensors"
    save_prior(
        again,
        prior,
        autoencoder_config=dict(prior.autoencoder.config),
        denoiser_config=dict(prior.denoiser.config),
        scheduler_config=dict(DDIMScheduler(**diffusion.SCHEDULER).config),
    )
    assert latentdem.load_prior(again).classes == diffusion.CLASSES


def test_priors_without_labels(tiny):
    autoencoder, unet = tiny[0](), tiny[1](None)
    assert network_multiple(autoencoder, unet, 2) == 8
    prior = LatentPrior(
        autoencoder, unet, DDIMScheduler(**diffusion.SCHEDULER).alphas_cumprod, "v_prediction",
        torch.zeros(12, 1, 1), torch.ones(12, 1, 1), 2, torch.empty(0), torch.empty(0),
    )  # fmt: skip
    assert prior.predict(torch.randn(1, 12, 8, 8), 10)[0].shape == (1, 12, 8, 8)
    with pytest.raises(ValueError, match="label 'sharp' is not one of the prior's: none"):
        prior.predict(torch.randn(1, 12, 8, 8), 10, "sharp")


def test_packaged_prior_has_the_multiple_of_its_networks():
    prior = latentdem.load_prior(latent_priors.PACKAGED)
    assert prior.multiple == network_multiple(prior.autoencoder, prior.denoiser, 2)
    # Unshuffled by 2, halved once by the encoder and three times by the denoiser.
    assert prior.multiple == 32
