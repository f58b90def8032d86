"""The first kernel: several, refined, and the one whose picture rings least."""

import pytest
import torch
from em.test_blur_model import scene

import latentdem_ext as ext
from latentdem.metrics import maximum_normalized_correlation
from latentdem.operators import initialization, kernel_search
from latentdem.operators.blur import BlurModel, EdgeStepSettings, above
from latentdem.operators.initialization import ITERATIONS, estimate_kernel
from latentdem.operators.kernel_search import ringing, search_kernel
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors import load_kernel_prior
from latentdem.priors.kernel import KernelDenoiserNet, SymmetricKernelPrior


def observe(kernel, side=128, noise_std=0.005, boundary="valid"):
    blurred = ext.blur_conv2d(scene(side), kernel, boundary=boundary)
    return blurred + noise_std * torch.randn(blurred.shape)


class Echo(KernelDenoiserNet):
    """Answers what it was asked, and counts."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, kernel, evidence=None):
        self.asked += 1
        return kernel / kernel.sum((-2, -1), keepdim=True)


def test_a_wrong_kernels_picture_rings():
    true, wrong = (random_motion_kernel(11, seed=seed) for seed in (3, 4))
    model = BlurModel(observe(true).mean(1, keepdim=True), kernel_size=11, noise_std=0.005)
    right, other = (
        ringing(model.crop(kernel_search.sparse(model, kernel))) for kernel in (true, wrong)
    )
    assert float(right) < float(other) - 0.1
    # Blur spreads gradients, too, and values outside [0, 1] count by themselves.
    assert ringing(model.crop(model.padded)) > right
    assert ringing(torch.tensor([[[[1.2, 0.0], [0.0, 1.2]]]])) > ringing(torch.eye(2)[None, None])


@pytest.mark.parametrize("place", range(4))
def test_the_right_one_of_several_is_chosen(monkeypatch, place):
    true = random_motion_kernel(11, seed=3)
    kernels = [random_motion_kernel(11, seed=seed) for seed in (4, 5, 6)]
    kernels.insert(place, true)
    order = iter(kernels)
    monkeypatch.setattr(kernel_search, "estimate_kernel", lambda *_, **__: next(order))
    monkeypatch.setattr(kernel_search, "REFINEMENTS", 0)
    found = search_kernel(observe(true), 11, noise_std=0.005, kernel_prior=Echo())
    assert torch.equal(found, above(true, EdgeStepSettings().searched_floor))


def test_the_starts_differ_and_the_best_are_refined(monkeypatch):
    asked, refined = [], []

    def estimate(observation, size, **options):
        asked.append((options["edge_weight"], options["answered"]))
        return random_motion_kernel(size, seed=len(asked))

    fit = BlurModel.fit_edges
    monkeypatch.setattr(kernel_search, "estimate_kernel", estimate)
    monkeypatch.setattr(
        BlurModel, "fit_edges", lambda *args, **kwargs: refined.append(1) or fit(*args, **kwargs)
    )
    search_kernel(observe(random_motion_kernel(9, seed=0)), 9, noise_std=0.01, kernel_prior=Echo())
    assert len(set(asked)) == len(kernel_search.STARTS) == 4
    # Four twice, then the three best six times more.
    assert len(refined) == 4 * 2 + 3 * 6


def test_large_kernels_are_searched_for_on_smaller_pictures_first(monkeypatch):
    """Eight at 0.4 of the size, the best at half of it, and on the picture with one of its own."""
    asked, refined = [], []

    def estimate(observation, size, **options):
        asked.append((observation.shape[-2:], size, options["edge_weight"], options["answered"]))
        return random_motion_kernel(size, seed=len(asked))

    refine = kernel_search.refine
    monkeypatch.setattr(kernel_search, "estimate_kernel", estimate)

    def noted(model, kernel, image, step):
        refined.append((model, step))
        return refine(model, kernel, image, step)

    monkeypatch.setattr(kernel_search, "refine", noted)
    monkeypatch.setattr(kernel_search, "LARGE_KERNEL", 15)
    true = random_motion_kernel(25, seed=0)
    found = search_kernel(observe(true, side=124), 25, noise_std=0.02, kernel_prior=Echo())
    assert found.shape == true.shape
    *coarse, fine = asked
    assert {(tuple(shape), size) for shape, size, *_ in coarse} == {((36, 36), 9)}
    assert len(set(coarse)) == len(coarse) == 8 and fine[1] == 25
    sizes = [model.kernel_size for model, _ in refined]
    # Eight three times and the best four three times; three twice; two and one three times.
    assert sizes == [9] * (8 * 3 + 4 * 3) + [13] * 3 * 2 + [25] * 3 * 3
    weights = [step.edge_weight for model, step in refined if model.kernel_size == 9]
    assert weights == sorted(weights, reverse=True) and weights[0] == pytest.approx(6 * weights[-1])
    assert refined[0][0].noise_std == pytest.approx(0.02 * 9 / 25)


def test_search_for_a_large_kernel():
    """Better than an estimate, by more than machines differ in rounding."""
    true, prior = random_motion_kernel(53, seed=1), load_kernel_prior()
    torch.manual_seed(0)
    observed = observe(true, side=400, noise_std=0.002)
    found = search_kernel(observed, 53, noise_std=0.002, kernel_prior=prior)
    assert found.shape == true.shape and float(found.sum()) == pytest.approx(1, abs=1e-5)
    estimate = initialization.estimate_kernel(observed, 53, kernel_prior=prior)
    assert maximum_normalized_correlation(estimate, true) < 0.9
    assert maximum_normalized_correlation(found, true) > 0.9


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_search_with_the_packaged_prior(boundary):
    true = random_motion_kernel(15, seed=8)
    observed = observe(true, boundary=boundary)
    found = search_kernel(
        observed, 15, noise_std=0.005, boundary=boundary, kernel_prior=load_kernel_prior()
    )
    assert found.shape == (1, 1, 15, 15)
    assert maximum_normalized_correlation(found, true) > 0.85
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    positive = found[found > 0]
    assert float(positive.min()) >= 0.099 * float(found.max())


@pytest.mark.parametrize("shape", [(1, 3, 9, 9), (1, 1, 12, 40)])
def test_search_on_the_smallest_pictures(shape):
    for observed in (torch.rand(shape), torch.full(shape, 0.5)):
        found = search_kernel(observed, 9, noise_std=0.002, kernel_prior=load_kernel_prior())
        assert torch.isfinite(found).all() and float(found.min()) >= 0
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("size", "prior", "searched"), [(9, True, True), (9, False, False),
                                                        (61, True, True)])  # fmt: skip
def test_models_search_with_a_prior(monkeypatch, size, prior, searched):
    calls = []
    for module, name in ((initialization, "estimate_kernel"), (kernel_search, "search_kernel")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: calls.append(name))
    net = Echo() if prior else None
    model = BlurModel(torch.rand(1, 3, 64, 64), kernel_size=size, noise_std=0.1, kernel_prior=net)
    model.start_parameters()
    assert calls == ["search_kernel" if searched else "estimate_kernel"]
    assert model.searches == searched


def test_m_steps_after_a_search_keep_more_of_the_kernel_before():
    true, before = (random_motion_kernel(11, seed=seed) for seed in (3, 4))
    image = torch.rand(1, 3, 64, 64)
    model = BlurModel(observe(true, side=74), kernel_size=11, noise_std=0.1, kernel_prior=Echo())
    image = torch.nn.functional.interpolate(image, model.canvas)
    settings = EdgeStepSettings(searched_momentum=1.0, searched_floor=0.0)
    kept = model.update(image, before, settings)
    torch.testing.assert_close(kept, before / before.sum())
    model.kernel_prior = None
    assert not torch.allclose(model.update(image, before, settings), kept, atol=1e-4)


def test_a_floor_takes_the_haze():
    kernel = torch.tensor([[[[1.0, 0.2, 0.09], [0.11, 0.05, 0.0], [0.0, 0.0, 0.0]]]])
    found = above(kernel, 0.1)
    assert torch.equal(found > 0, kernel > 0.1)
    assert float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(above(kernel, 0.0), kernel / kernel.sum())


@pytest.mark.parametrize(("answered", "count"), [(None, 3), (0, 0), (2, 6), (ITERATIONS, 15)])
def test_how_often_the_prior_answers(answered, count):
    """Kernels of 17 pixels have three scales that are large enough for it."""
    echo = Echo()
    estimate_kernel(scene(64), 17, kernel_prior=echo, answered=answered)
    assert echo.asked == count


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_turn_with_the_question(batch):
    torch.manual_seed(0)
    net = load_kernel_prior()
    prior, evidence = SymmetricKernelPrior(net), torch.rand(batch, 5, 13, 13)
    with torch.no_grad():
        answer = prior(evidence[:, :1], evidence)
        assert answer.shape == (batch, 1, 13, 13)
        assert torch.allclose(answer.sum((-2, -1)), torch.ones(batch, 1), atol=1e-5)
        for turned in (lambda x: x.rot90(1, (-2, -1)), lambda x: x.flip(-2)):
            other = turned(evidence)
            torch.testing.assert_close(
                prior(other[:, :1], other), turned(answer), atol=1e-6, rtol=1e-4
            )
            plain = net(other[:, :1], other) - turned(net(evidence[:, :1], evidence))
            assert float(plain.abs().max()) > 1e-5
        mean = sum(
            net(e[:, :1], e).rot90(-turns, (-2, -1))
            for turns in range(4)
            for e in [evidence.rot90(turns, (-2, -1))]
        )
        mirrored = evidence.flip(-1)
        mean = mean + sum(
            net(e[:, :1], e).rot90(turns, (-2, -1)).flip(-1)
            for turns in range(4)
            for e in [mirrored.rot90(-turns, (-2, -1))]
        )
        torch.testing.assert_close(answer, mean / 8, atol=1e-6, rtol=1e-4)
