"""Several photographs in one network call, and in little memory."""

import pytest
import torch
from em.tiny_prior import tiny_prior

import latentdem
import latentdem_ext as ext
from latentdem.em import memory, steps, together
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.em.steps import Track, run_prox_together
from latentdem.evaluate import photograph_crop
from latentdem.metrics import psnr
from latentdem.operators.blur import BlurModel
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors import load_prior

# Without thresholds, of the sparse prior and of L0 edges, rounding stays rounding.
SMOOTH = ProxSettings(steps=2, chains=2, sparse_share=0.0, total_variation=0.0)
KERNEL = torch.ones(1, 1, 5, 5) / 25


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


@pytest.fixture(scope="module")
def blurred():
    """Three photographs of one size, the last one with clipped highlights."""
    names = ("coffee", "chelsea", "astronaut")
    kernels = [random_motion_kernel(9, seed=seed) for seed in range(3)]
    crops = [
        ext.blur_conv2d(photograph_crop(name, 72), kernel, boundary="valid")
        for name, kernel in zip(names, kernels, strict=True)
    ]
    crops[2][:, :, 5:9, 5:9] = 1
    return torch.cat(crops)


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that went through the loop."""
    real, sizes = together.run_prox_together, []

    def counted(prior, tracks, *arguments, **options):
        sizes.append(len(tracks))
        return real(prior, tracks, *arguments, **options)

    monkeypatch.setattr(together, "run_prox_together", counted)
    return sizes


def test_batch_mates_do_not_matter(blurred, batches):
    """With the packaged prior, a known kernel and noise of each photograph's own."""
    options = {"kernel": KERNEL, "settings": SMOOTH}
    alone = [latentdem.deblur(x, **options) for x in blurred]
    batches.clear()
    found = latentdem.deblur(blurred, batch_size=2, **options)
    assert batches == [2, 1]
    for index, one in enumerate(alone):
        assert torch.allclose(found.image[index], one.image[0], atol=1e-4)
        assert found.report["noise_std"][index] == one.report["noise_std"][0]
        (history,) = one.history
        for row, expected in zip(found.history[index], history, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
    assert found.report["network_evaluations"] == 3 * 2 * 2
    assert len(found.report["peak_memory_bytes"]) == 3


def test_blindly_too(blurred):
    """M-steps choose edges by thresholds, so that single pixels differ by more than rounding."""
    settings = ProxSettings(steps=2, chains=1)
    alone = latentdem.deblur(blurred, kernel_size=9, settings=settings)
    found = latentdem.deblur(blurred, kernel_size=9, settings=settings, batch_size=3)
    assert torch.allclose(found.kernel, alone.kernel, atol=1e-3)
    assert float(psnr(found.image, alone.image).min()) > 50


def test_canvases_of_different_sizes_are_not_mixed(prior, batches, monkeypatch):
    images = torch.rand(4, 3, 48, 48)
    sizes = iter((9, 21, 9, 21))
    monkeypatch.setattr(
        latentdem.em.driver,
        "find_kernel",
        lambda *_, **__: (lambda k: torch.full((1, 1, k, k), 1 / k**2))(next(sizes)),
    )
    settings = ProxSettings(steps=1, chains=1, sparse_share=0.0, total_variation=0.0)
    reported = []
    result = latentdem.deblur(
        images, prior=prior, settings=settings, batch_size=2,
        progress=lambda index, count, report: reported.append((index, count)),
    )  # fmt: skip
    assert batches == [2, 2] and result.report["kernel_sizes"] == [9, 21, 9, 21]
    assert reported == [(0, 4), (2, 4), (1, 4), (3, 4)]
    models = [BlurModel(images[:1], kernel_size=k, noise_std=0.01) for k in (9, 21)]
    tracks = [Track(model, torch.Generator(), KERNEL) for model in models]
    with pytest.raises(ValueError, match="must share a canvas, found"):
        run_prox_together(prior, tracks, settings)


def test_batch_size_follows_free_memory(prior, batches, monkeypatch):
    images = torch.rand(5, 3, 32, 32)
    settings = ProxSettings(steps=1, chains=1, sparse_share=0.0, total_variation=0.0)
    options = {"prior": prior, "kernel": KERNEL, "settings": settings, "batch_size": "auto"}
    latentdem.deblur(images, **options)
    assert batches == [1] * 5  # on a CPU

    class Elsewhere:
        def __getattr__(self, name):
            return torch.device("cuda") if name == "device" else getattr(prior, name)

    batches.clear()
    several = together.Batches(Elsewhere(), settings, batch_size="auto")
    monkeypatch.setattr(together, "measured", lambda _: memory.measured(torch.device("cpu")))
    monkeypatch.setattr(memory, "_resident_peak", iter(range(0, 10**9, 10**6)).__next__)
    monkeypatch.setattr(together, "free_memory", lambda _: 2_500_000)
    monkeypatch.setattr(
        together, "run_prox_together",
        lambda _, tracks, *__, **___: batches.append(len(tracks))
        or [steps.EMState(t.model.padded, KERNEL) for t in tracks],
    )  # fmt: skip
    for number, image in enumerate(images.split(1)):
        model = BlurModel(image, kernel_size=5, noise_std=0.01)
        several.add(number, Track(model, torch.Generator(), KERNEL))
    several.finish()
    # The first one took a megabyte; of 2.5 free ones, 80 % may be used.
    assert batches == [1, 2, 2] and sorted(several.states) == [0, 1, 2, 3, 4]


def test_compiled_batches_have_few_shapes(prior, batches, monkeypatch):
    several = together.Batches(prior, ProxSettings(), batch_size=8, compile="default")
    monkeypatch.setattr(
        together, "run_prox_together",
        lambda _, tracks, *__, **___: batches.append([t.model.kernel_size for t in tracks])
        or [steps.EMState(t.model.padded, KERNEL) for t in tracks],
    )  # fmt: skip
    image = torch.rand(1, 3, 48, 48)
    for number in range(11):
        # Both on the same canvas.
        model = BlurModel(image, kernel_size=(5, 7)[number > 8], noise_std=0.01)
        several.add(number, Track(model, torch.Generator(), KERNEL))
    for _ in range(2):
        several.add(len(several.states) + 3, Track(model, torch.Generator(), KERNEL))
    several.finish()
    assert batches == [[5] * 8, [5], [7] * 4]


def test_sizes_of_batches():
    assert [memory.graph_size(count) for count in (1, 2, 3, 15, 16)] == [1, 2, 2, 8, 16]
    assert memory.batch_size_for(0, 10**12) == 1  # nothing is known
    assert memory.batch_size_for(10**9, 10**8) == 1
    assert memory.batch_size_for(10**9, 10**11) == memory.LARGEST_BATCH
    with memory.measured(torch.device("cpu")) as peak:
        torch.ones(2**22)
    assert peak.bytes >= 0


def test_options_that_cannot_be_used(prior, blurred):
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, or 'auto', found 0"),
        ({"batch_size": "many"}, "batch_size must be at least 1, or 'auto', found 'many'"),
        ({"compile": "fast"}, "compile must be one of default, reduce-overhead, max-autotune"),
        ({"compile": "default", "method": "paper"}, "only the E-step of method 'prox' is"),
        ({"dtype": "fp8"}, "dtype must be fp32, fp16 or bf16, found 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            latentdem.deblur(blurred[:1], prior=prior, kernel_size=9, **options)


def test_paper_and_tiles_are_restored_one_by_one(prior, batches):
    images = torch.rand(2, 3, 48, 48)
    paper = PaperSettings(steps=2, every=1, last=1)
    options = {"prior": prior, "kernel_size": 5, "batch_size": 2}
    assert len(latentdem.deblur(images, method="paper", settings=paper, **options).image) == 2
    settings = ProxSettings(steps=1, chains=1)
    large = torch.rand(2, 3, 96, 100)
    result = latentdem.deblur(large, tile=64, settings=settings, **options)
    assert len(result.report["tiles"]) == len(result.report["peak_memory_bytes"]) == 2
    assert batches == []


def test_half_precision_by_name(prior, blurred):
    found = latentdem.deblur(
        blurred[:1], prior=prior, kernel=KERNEL, settings=SMOOTH, dtype="bf16", batch_size="auto"
    )
    assert found.report["dtype"] == "bfloat16"
    assert found.image.dtype == found.kernel.dtype == torch.float32
    assert found.report["peak_memory_kind"] == "growth of the process's peak resident set"


def test_slices_and_tiles_of_the_autoencoder(prior, monkeypatch):
    images = torch.rand(3, 3, 40, 40)
    latents = prior.encode(images)
    calls, real = [], type(prior.autoencoder).encode

    def encode(self, x, *arguments, **options):
        calls.append(len(x))
        return real(self, x, *arguments, **options)

    monkeypatch.setattr(type(prior.autoencoder), "encode", encode)
    sliced = prior.economical()
    assert torch.allclose(sliced.encode(images), latents, atol=1e-5) and calls == [1, 1, 1]
    whole = prior.decode(latents, (40, 40))
    assert torch.allclose(sliced.decode(latents, (40, 40)), whole, atol=1e-5)
    tiled = prior.economical(slicing=False, tiling=True)
    assert tiled.autoencoder.use_tiling and not prior.autoencoder.use_tiling
    assert tiled.autoencoder.tile_sample_min_size == 512
    assert tiled.autoencoder.tile_latent_min_size == 256
    assert tiled.denoiser is prior.denoiser and not tiled.slicing
    # A picture of one tile is as it was; a larger one nearly.
    assert torch.equal(tiled.decode(latents, (40, 40)), whole)
    small = load_prior().economical(tiling=True)
    small.autoencoder.tile_sample_min_size, small.autoencoder.tile_latent_min_size = 32, 16
    picture = photograph_crop("coffee", 96)
    there = small.decode(small.encode(picture), (96, 96))
    assert float(psnr(there, load_prior().decode(load_prior().encode(picture), (96, 96)))) > 25
    with pytest.raises(ValueError, match=r"autoencoder \(Identity\) does not work in tiles"):
        type(prior)(**{**vars(prior), "autoencoder": torch.nn.Identity()}).economical(tiling=True)
