"""The E-step as one compiled graph."""

import pytest
import torch
from em.tiny_prior import tiny_prior
from torch._dynamo.testing import CompileCounterWithBackend

import latentdem
import latentdem_ext as ext
from latentdem.em import e_step
from latentdem.em.settings import ProxSettings
from latentdem.em.steps import run_prox
from latentdem.evaluate import photograph_crop
from latentdem.metrics import psnr
from latentdem.operators.blur import BlurModel
from latentdem.operators.linear_light import LinearLightModel, to_light

# Without thresholds, of the sparse prior and of L0 edges, rounding stays rounding.
SMOOTH = ProxSettings(steps=3, chains=1, sparse_share=0.0, total_variation=0.0)
KERNEL = torch.ones(1, 1, 5, 5) / 25


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


@pytest.fixture(scope="module")
def blurred():
    """Three photographs of one size, the last one with clipped highlights."""
    crops = [photograph_crop(name, 36) for name in ("coffee", "chelsea", "astronaut")]
    found = ext.blur_conv2d(torch.cat(crops), KERNEL, boundary="valid")
    found[2, :, 5:9, 5:9] = 1
    return found


def test_one_graph_serves_all_steps_and_photographs(prior, blurred, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(e_step.e_step, fullgraph=True, dynamic=False, backend=counter)
    monkeypatch.setattr(e_step, "compiled", lambda mode: graph)
    torch._dynamo.reset()
    # The last photograph has clipped highlights; blindly, M-steps amplify rounding.
    for index, noise_std, kernel in ((0, 0.01, KERNEL), (2, 0.02, KERNEL), (1, 0.01, None)):
        found = []
        for mode in (None, "default"):
            model = BlurModel(blurred[index : index + 1], kernel_size=5, noise_std=noise_std)
            generator = torch.Generator().manual_seed(0)
            found.append(run_prox(prior, model, SMOOTH, generator, kernel=kernel, compile=mode))
        eager, compiled = found
        tolerance = 1e-5 if kernel is not None else 1e-2
        assert torch.allclose(eager.image, compiled.image, atol=tolerance)
        residuals = [[row["residual_std"] for row in state.history] for state in found]
        assert residuals[1] == pytest.approx(residuals[0], rel=tolerance)
        assert list(compiled.seconds) == ["first_kernel", "e_step"] + ["m_step"] * (
            kernel is None
        ) + ["finish"]
    assert counter.frame_count == 1


def test_linear_light_is_in_the_graph(blurred):
    inner = BlurModel(to_light(blurred[:1]), kernel_size=5, noise_std=0.01)
    model = LinearLightModel(inner, blurred[:1], noise_std=0.01)
    noise = 0.05 * torch.randn(2, 3, *model.canvas)
    level = torch.tensor([1.0, 0.1, 1.0, 0.1, 0.1])
    arguments = (model, model.padded + noise, KERNEL, torch.tensor(1e-4), level, SMOOTH)
    graph = torch.compile(e_step.fit, fullgraph=True, dynamic=False, backend="eager")
    for eager, compiled in zip(e_step.fit(*arguments), graph(*arguments), strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)


def test_what_cannot_be_compiled_is_said(prior, monkeypatch):
    class Asks(BlurModel):
        def proximal(self, estimate, kernel, *, ratio, imputations=3):
            return estimate * float(ratio.sum()) if bool(ratio > 0) else estimate

    graph = torch.compile(e_step.e_step, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(e_step, "compiled", lambda mode: graph)
    model = Asks(torch.rand(1, 3, 32, 32), kernel_size=5, noise_std=0.01)
    with pytest.raises(ValueError, match="this E-step cannot be compiled: "):
        run_prox(prior, model, SMOOTH, torch.Generator(), kernel=KERNEL, compile="default")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_cuda(blurred, mode):
    options = {"kernel": KERNEL, "settings": SMOOTH, "device": "cuda", "dtype": "fp32"}
    eager = latentdem.deblur(blurred, **options)
    found = latentdem.deblur(blurred, compile=mode, batch_size="auto", **options)
    assert float(psnr(found.image, eager.image).min()) > 40
    assert all(found.report["peak_memory_bytes"])
