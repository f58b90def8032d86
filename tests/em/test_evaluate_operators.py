"""The suite of forward models, on small crops and one step."""

import json

import pytest
import torch
from rich.console import Console

from latentdem import evaluate_operators
from latentdem.evaluate_operators import CASES, Case, run_operators_suite, turned
from latentdem.operators.motion import random_motion_kernel


def delta(size=5):
    kernel = torch.zeros(1, 1, size, size)
    kernel[..., size // 2, size // 2] = 1
    return kernel


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(evaluate_operators, "SIDE", 96)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_coarse_pixels_are_those_of_the_sharp_image(scale):
    case = Case("", 5, lambda index: delta(), {"scale": scale})
    observed, sharp = case.observe("coffee", case.kernels(0), seed=0)
    count = 96 // scale
    assert observed.shape == (1, 3, count, count)
    assert sharp.shape == (1, 3, count * scale, count * scale)
    offset = (scale - 1) // 2
    kept = sharp[..., offset::scale, offset::scale]
    assert float((observed - kept).std()) == pytest.approx(0.01, rel=0.1)


def test_light_is_blurred_and_not_its_display_values():
    kernel = random_motion_kernel(25, seed=7)
    (light,) = (case for case in CASES if case.options.get("linear_light"))
    plain = Case("", 25, light.kernels)
    (brighter, sharp), (darker, same) = (c.observe("camera", kernel, 1) for c in (light, plain))
    assert torch.equal(sharp, same)
    # The curve is concave: a mean of light is shown brighter than the mean of what is shown.
    assert float((brighter - darker).mean()) > 0.005
    assert float((brighter - darker).min()) > -0.01


def test_turning():
    kernel = random_motion_kernel(9, seed=1)
    assert torch.allclose(turned(kernel, 0), kernel, atol=1e-6)
    assert torch.allclose(turned(kernel, 90).rot90(-1, (-2, -1)), kernel, atol=1e-5) or (
        torch.allclose(turned(kernel, 90).rot90(1, (-2, -1)), kernel, atol=1e-5)
    )
    assert float(turned(kernel, 17).sum()) == pytest.approx(1)


def test_every_case_makes_an_observation():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        kernels = case.kernels(0)
        rows, columns = case.options.get("grid", (1, 1))
        assert kernels.shape == (1, rows * columns, case.size, case.size)
        assert torch.allclose(kernels.sum((-2, -1)), torch.ones(1, rows * columns), atol=1e-5)
        observed, sharp = case.observe("camera", kernels, seed=1)
        assert observed.shape[-1] * case.scale == sharp.shape[-1]
        assert torch.isfinite(observed).all()


def test_suite_resumes(tmp_path, monkeypatch):
    output = tmp_path / "operators.json"
    names = ("defocus, radius 2.5", "2 x 2 turning kernels", "motion in linear light",
             "super-resolution x2, Gaussian")  # fmt: skip
    chosen = tuple(case for case in CASES if case.name in names)
    options = {"images": 1, "steps": 1, "console": Console(quiet=True), "cases": chosen}
    document = run_operators_suite(output, **options)
    assert [row["case"] for row in document["rows"]] == [case.name for case in chosen]
    assert set(document["summary"]) == set(names)
    for row in document["rows"]:
        assert ("psnr_free" in row) == (not row["case"].startswith("super"))
        assert row["psnr_true_kernel"] > row["psnr_input"]
    assert "turning" in output.with_suffix(".html").read_text()
    assert len(list((tmp_path / "operators-pictures").iterdir())) == 4

    def computed(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluate_operators, "_run", computed)
    assert run_operators_suite(output, **options) == json.loads(output.read_text())
    with pytest.raises(ValueError, match="another setup"):
        run_operators_suite(output, **(options | {"steps": 2}))
    with pytest.raises(ValueError, match="images must lie between"):
        run_operators_suite(output, **(options | {"images": 99}))
