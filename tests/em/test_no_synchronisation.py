"""The loop of ``prox`` never waits for its device, nor does the deconvolution of its search."""

import pytest
import torch

import latentdem
import latentdem_ext as ext
from latentdem.devices import SynchronisationError, no_synchronisation, parse_dtype
from latentdem.em import steps
from latentdem.em.recording import PhaseClock, Recorder
from latentdem.em.settings import ProxSettings
from latentdem.evaluate import photograph_crop
from latentdem.operators.blur import BlurModel
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian
from latentdem.operators.motion import random_motion_kernel

QUICK = ProxSettings(steps=2, chains=1, sparse_share=0.0, total_variation=0.0)


@pytest.fixture(scope="module")
def blurred():
    kernel = random_motion_kernel(9, seed=3)
    return ext.blur_conv2d(photograph_crop("coffee", 72), kernel, boundary="valid")


@pytest.fixture
def guarded(monkeypatch):
    """The loop runs where waiting raises; says how often it ran."""
    real, runs = steps._trajectory, []

    def trajectory(*arguments):
        runs.append(1)
        with no_synchronisation():
            return real(*arguments)

    monkeypatch.setattr(steps, "_trajectory", trajectory)
    return runs


MODELS = {
    "motion": {"kernel_size": 9},
    "super-resolution": {"scale": 2},
    "varying": {"grid": (1, 2), "kernel_size": 9},
    "known": {"kernel": torch.ones(5, 5)},
    "circular": {"kernel_size": 9, "boundary": "circular"},
    "linear light": {"kernel_size": 9, "linear_light": True},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_loop_asks_no_tensor_for_its_value(blurred, guarded, options):
    free = latentdem.deblur(blurred, noise_std=0.01, settings=QUICK, **options)
    assert guarded == [1]
    (history,) = free.history
    assert [row["step"] for row in history] == [0, 1]
    assert all(0 < row["residual_std"] < 1 and 0 < row["kernel_peak"] <= 1 for row in history)


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_the_sparse_deconvolution_asks_no_tensor_for_its_value(blurred, boundary):
    """The search makes dozens of them."""
    model = BlurModel(blurred, kernel_size=9, noise_std=0.01, boundary=boundary)
    kernel = model.initial_kernel()
    expected = hyper_laplacian(model, kernel, HyperLaplacianSettings())
    with no_synchronisation():
        found = hyper_laplacian(model, kernel, HyperLaplacianSettings())
    assert torch.equal(found, expected)


def test_reports_are_the_history(blurred, guarded):
    reports = []
    result = latentdem.deblur(
        blurred,
        kernel_size=9,
        settings=QUICK,
        progress=lambda index, count, report: reports.append((index, count, report)),
    )
    assert guarded == [1] and len(reports) == 2
    for (index, count, report), row in zip(reports, result.history[0], strict=True):
        assert (index, count, report.steps) == (0, 1, 2)
        assert {name: getattr(report, name) for name in row} == row
        assert report.image.shape == blurred.shape and report.kernel.shape[-1] == 9


def test_a_family_of_kernels_is_drawn_by_the_processor(blurred, guarded):
    """The exception that the documents name."""
    with pytest.raises(SynchronisationError, match="aten::"):
        latentdem.deblur(blurred, blur="defocus", kernel_size=9, settings=QUICK)


class Event:
    """Stands in for that of a GPU."""

    def __init__(self, enable_timing=False):
        self.recorded = self.awaited = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded
        self.awaited = True

    def elapsed_time(self, end):
        assert end.awaited
        return 250.0


def test_on_a_gpu_reports_come_one_step_late(monkeypatch):
    """The bookkeeping, with tensors of the CPU."""
    real = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory, **kind: real(*sizes, **kind))
    told, gpu = [], torch.device("cuda")
    recorder = Recorder([30, 20, 10], lambda report: told.append(report), gpu)
    for step in range(3):
        variance = torch.tensor(0.25) / 4**step
        recorder.record(variance, torch.full((1, 3, 2, 2), float(step)), torch.rand(1, 1, 3, 3))
        assert [report.step for report in told] == list(range(step))
    history = recorder.history()
    assert [row["residual_std"] for row in history] == [0.5, 0.25, 0.125]
    assert [row["timestep"] for row in history] == [30, 20, 10]
    for step, (report, row) in enumerate(zip(told, history, strict=True)):
        assert float(report.image[0, 0, 0, 0]) == report.step == row["step"] == step
        assert {name: getattr(report, name) for name in row} == row


def test_phases_are_timed_where_they_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = PhaseClock(torch.device("cuda"))
    for _ in range(2):
        with clock.phase("prior"):
            pass
    assert clock.seconds() == {"prior": 0.5} == clock.seconds()
    processor = PhaseClock(torch.device("cpu"))
    with processor.phase("prior"):
        pass
    assert 0 < processor.seconds()["prior"] < 0.2


@pytest.mark.needs_cuda
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_loop_waits_for_no_gpu(blurred, guarded, options):
    found = latentdem.deblur(blurred, settings=QUICK, device="cuda", **options)
    assert guarded == [1] and bool(found.image.isfinite().all())


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.equal(x + 1),
        lambda x: torch.tensor([1.0, 2.0]) + x,
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.tensor([1, 2], dtype=torch.long)),
        lambda x: x.unique(),
        lambda x: x.to("meta"),
        lambda x: torch.empty(2, device="meta").copy_(x),
    ],
)
def test_what_waits_is_found(waits):
    x = torch.rand(2)
    with no_synchronisation(), pytest.raises(SynchronisationError, match="aten::"):
        waits(x)


def test_what_does_not_wait_is_allowed():
    x = torch.rand(2, 3)
    with no_synchronisation():
        y = x[..., torch.arange(2)].sum() * 2 + x.new_full((), 3.0)
        torch.empty(2, 3, device="meta").copy_(x, non_blocking=True)
        z = torch.where(y > 0, y, -y).to(torch.float64)
    assert z.tolist() > 0


def test_names_of_formats():
    assert parse_dtype(None) is None
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == torch.bfloat16
    assert parse_dtype("fp16") == parse_dtype(torch.float16) == torch.float16
    for wrong in ("fp8", torch.int32):
        with pytest.raises(ValueError, match="dtype must be fp32, fp16 or bf16, found"):
            parse_dtype(wrong)
