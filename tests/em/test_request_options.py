"""Options that a request has only where they were given: older results stay what was asked for."""

import json

import pytest
import torch
from em.test_deblur import invoke

from latentdem.batch import Options, run_batch
from latentdem.batch.inputs import Item
from latentdem.batch.request import Requests, digest
from latentdem.em.options import placement
from latentdem.io import to_pil

options = pytest.mark.parametrize(
    ("words", "name", "default", "given"),
    [
        (("--linear-light",), "linear_light", False, True),
        (("--quality", "fast"), "quality", "standard", "fast"),
        (("--tiling",), "tiling", False, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@options
def test_the_commands_take_it(tmp_path, words, name, default, given):
    (tmp_path / "in").mkdir()
    photo = tmp_path / "in" / "photo.png"
    to_pil(torch.rand(3, 40, 36)).save(photo)
    common = ("--kernel-size", 5, "--steps", 1, "--assume-blurred")
    for extra, value in ((), default), (words, given):
        result = invoke("deblur", photo, "-o", tmp_path / "out", *common, *extra)
        assert result.exit_code == 0, result.output
        report = report_of(tmp_path / "out")
        assert report[name] == value
        assert (name in report["request"]) is bool(extra)
    again = invoke("deblur", photo, "-o", tmp_path / "out", *common, *words)
    assert "already done" in " ".join(again.output.split())
    result = invoke("batch", tmp_path / "in", "-o", tmp_path / "many", *common, *words)
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "many" / "photo")
    assert report[name] == given and report["request"][name] == given


@options
def test_a_batch_knows_the_results_apart_and_keeps_the_old_ones(
    tmp_path, words, name, default, given
):
    def request(**options):
        return Requests(Options(**options), "cpu").options(Item("a", "a", "a"))

    assert name not in request() and request(**{name: given})[name] == given
    assert digest(request()) != digest(request(**{name: given}))
    to_pil(torch.rand(3, 40, 36)).save(tmp_path / "photo.png")
    for value in (default, given):
        asked = Options(kernel_size=5, steps=1, assume_blurred=True, **{name: value})
        run_batch([tmp_path / "photo.png"], tmp_path / "out", asked)
        assert report_of(tmp_path / "out" / "photo")[name] == value


@pytest.mark.parametrize(("instructions", "found"), [(True, "bfloat16"), (False, "float32")])
def test_the_commands_take_the_fastest_number_format(tmp_path, monkeypatch, instructions, found):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    here = torch.device("cpu")
    assert placement("cpu", "auto", here)[1] == (torch.bfloat16 if instructions else None)
    assert placement("cpu", None, here)[1] is None  # in Python nothing changes by itself
    (tmp_path / "in").mkdir()
    photo = tmp_path / "in" / "photo.png"
    to_pil(torch.rand(3, 40, 36)).save(photo)
    common = ("--kernel-size", 5, "--steps", 1, "--assume-blurred")
    assert invoke("deblur", photo, "-o", tmp_path / "out", *common).exit_code == 0
    report = report_of(tmp_path / "out")
    assert report["dtype"] == found and "dtype" not in report["request"]
    assert invoke("batch", tmp_path / "in", "-o", tmp_path / "many", *common).exit_code == 0
    report = report_of(tmp_path / "many" / "photo")
    # So that workers on other machines follow, and a resumed run does not mix the two.
    assert report["dtype"] == found and report["request"].get("dtype") == (
        "bfloat16" if instructions else None
    )
    assert Options(dtype="auto").settled("cuda:1").dtype is None
    assert Options(dtype="fp32").settled("cpu").dtype == "fp32"
