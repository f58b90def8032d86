"""Where the time goes: phases by name in the trace, operators with their rates."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import latentdem
from latentdem.cli import app
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.em.steps import PHASE
from latentdem.io import to_pil
from latentdem.operators.blur import BlurModel
from latentdem.profiling import _figures, bytes_given, phases_picture

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROX = {"first_kernel", "prior", "e_step", "m_step", "encoder", "finish"}


@pytest.mark.parametrize(
    ("method", "settings", "phases"),
    [
        ("prox", ProxSettings(steps=2, chains=1), PROX),
        ("paper", PaperSettings(steps=2, every=1, last=1), {"prior", "m_step", "e_step"}),
    ],
)
def test_phases_are_named_for_the_profiler_and_timed(method, settings, phases, monkeypatch):
    # A profiler of torch's own sees the search, too, and takes a minute to add it up.
    monkeypatch.setattr(BlurModel, "searches", property(lambda self: False))
    with profile(activities=[ProfilerActivity.CPU]) as recorder:
        result = latentdem.deblur(IMAGE, kernel_size=9, method=method, settings=settings)
    seen = {event.key for event in recorder.key_averages()}
    assert {PHASE + name for name in phases} <= seen
    seconds = result.report["seconds_by_phase"]
    assert set(seconds) == phases
    assert 0.5 * result.report["seconds"] < sum(seconds.values()) <= result.report["seconds"]


def test_command(tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    to_pil(IMAGE[0]).save(photo)
    command = ["profile", str(photo), "-o", str(out), "--kernel-size", "9", "--steps", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {
        "trace.json", "operators.txt", "phases.png", "report.json",
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert set(report["phases"]) == PROX | {"rest"}
    assert sum(p["share"] for p in report["phases"].values()) == pytest.approx(1, abs=0.01)
    convolution = next(r for r in report["operators"] if "convolution" in r["name"])
    assert convolution["calls"] > 10 and convolution["milliseconds"] > 0
    assert any(row["gflop_per_s"] for row in report["operators"])
    rates = [row["gb_per_s"] for row in report["operators"] if row["gb_per_s"] is not None]
    assert len(rates) >= 5 and all(0 < rate < 2000 for rate in rates)
    assert not any(row["name"].startswith(PHASE) for row in report["operators"])
    names = [
        event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]
    ]
    assert names.count(PHASE + "m_step") >= 1 and names.count(PHASE + "first_kernel") == 1
    # None of the search's, which are dozens.
    assert names.count("latentdem::kernel_map_statistics") == names.count(PHASE + "m_step")
    assert report["phases"]["first_kernel"]["share"] > 0.1
    wrong = CliRunner().invoke(app, ["profile", str(tmp_path / "no.png"), "-o", str(out)])
    assert wrong.exit_code == 1 and "no such file" in wrong.output


def test_picture_has_a_bar_a_phase():
    picture = phases_picture({"prior": 3.0, "m_step": 1.0, "idle": 0.0})
    assert isinstance(picture, Image.Image) and picture.size == (640, 88)
    blue = (70, 110, 180)
    lengths = [sum(picture.getpixel((x, y)) == blue for x in range(640)) for y in (20, 44, 68)]
    assert lengths[0] == pytest.approx(3 * lengths[1], rel=0.05)
    assert lengths[2] <= 2


def test_bytes_of_what_operators_are_given():
    real, half = torch.ones(6, 5), torch.ones(5).half()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorder:
        real * half
        torch.fft.rfft(real) * 2
        real.sum()
    given = bytes_given(recorder.events())
    assert given["aten::mul"] == 4 * 30 + 2 * 5 + 8 * 18
    assert given["aten::sum"] >= 4 * 30 and given["aten::nothing"] == 0


def test_a_wrapper_of_other_operators_has_no_bandwidth():
    def rate(own, whole):
        event = SimpleNamespace(
            key="x", count=1, flops=0, self_cpu_time_total=own, cpu_time_total=whole
        )
        return _figures(event, "self_cpu_time_total", 8000)["gb_per_s"]

    assert rate(2.0, 2.0) == rate(2.0, 3.0) == 4.0
    assert rate(2.0, 5.0) is None and rate(0.0, 0.0) is None
