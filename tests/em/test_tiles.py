"""Large photographs in tiles: geometry, blending, and a run that is killed."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import latentdem
import latentdem_ext as ext
from latentdem import cli
from latentdem.em import tiles, together
from latentdem.em.settings import PaperSettings, ProxSettings, for_kernel_alone
from latentdem.em.steps import EMState, StepReport
from latentdem.em.tiles import (
    blend_weight,
    even_side,
    informative_window,
    solve_in_tiles,
    spans,
)
from latentdem.evaluate import photograph_crop
from latentdem.io import to_pil
from latentdem.metrics import aligned_psnr
from latentdem.operators.motion import random_motion_kernel

QUICK = ProxSettings(steps=2, chains=1)


@pytest.mark.parametrize("length", [50, 100, 101, 180, 999])
@pytest.mark.parametrize("overlap", [10, 49])
def test_spans_cover_and_overlap(length, overlap):
    starts = spans(length, 100, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, length - 100)
    for a, b in pairwise(starts):
        assert a < b <= a + 100 - overlap


@pytest.mark.parametrize("length", [50, 99, 100, 101, 181, 320, 999, 6000])
@pytest.mark.parametrize("overlap", [10, 49])
def test_even_tiles_are_as_few_and_overlap_as_little_as_they_may(length, overlap):
    side = even_side(length, 100, overlap)
    starts = spans(length, side, overlap)
    assert side <= 100 and len(starts) <= len(spans(length, 100, overlap))
    assert side >= min(2 * overlap, length)
    shared = sum(a + side - b for a, b in pairwise(starts))
    if side > 2 * overlap:  # else the least side decides
        assert shared < len(starts) * (overlap + 1)


def test_window_is_where_the_edges_are_and_nothing_is_clipped():
    image = torch.full((1, 3, 300, 400), 0.5)
    image += 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    image[..., 200:260:8, 300:380] = 0.9
    image[..., 20:100:8, 20:120] = 1.0  # stronger, but clipped
    top, left, height, width = informative_window(image, 96)
    assert (height, width) == (96, 96)
    assert 164 <= top <= 204 and 284 <= left <= 304
    assert informative_window(image, 1000) == (0, 0, 300, 400)


def test_weights_add_up_smoothly_and_vanish_at_inner_sides():
    overlap, dead = 41, 12
    starts = spans(300, 120, overlap)
    total = torch.zeros(300)
    for k, start in enumerate(starts):
        inner = (k > 0, start + 120 < 300, False, False)
        weight = blend_weight(120, 7, inner, dead, overlap)
        assert weight.shape == (1, 1, 120, 7)
        column = weight[0, 0, :, 3]
        if k > 0:
            assert float(column[:dead].max()) < 1e-3
        assert float(column.diff().abs().max()) < 0.1
        total[start : start + 120] += column
    assert float(total.min()) > 0.5


def exact(truth, kernel):
    """A solver that knows: each tile's image is the truth, but for its border."""

    def solve(part, known, seed, callback):
        state = EMState(truth(part), kernel if known is None else known, evaluations=1)
        state.image[..., 0, :] = 9.0  # what a tile does not know
        state.history.append({"step": 0, "timestep": 10, "residual_std": 0.02, "kernel_peak": 0.1})
        callback(StepReport(0, 1, 10, 0.02, 0.1, state.image, state.kernel))
        return state

    return solve


def test_tiles_are_put_together(tmp_path):
    image = torch.rand(1, 3, 210, 150, generator=torch.Generator().manual_seed(0))
    kernel = random_motion_kernel(9, seed=0)
    reports = []
    found = solve_in_tiles(
        image,
        exact(torch.clone, kernel),
        kernel=None,
        kernel_size=9,
        steps=1,
        tile=80,
        seed=0,
        callback=reports.append,
    )
    assert len(found.tiles) > 4 and found.window is not None
    # Only the picture's own upper border is what one tile alone knows.
    torch.testing.assert_close(found.image[..., 1:, :], image[..., 1:, :], atol=0.02, rtol=0)
    assert torch.equal(found.state.kernel, kernel)
    assert found.state.evaluations == len(found.tiles) + 1 == len(reports)
    assert [r.step for r in reports] == list(range(len(reports)))
    assert all(r.steps == len(reports) and r.image.shape == image.shape for r in reports)
    assert len(found.state.history) == len(reports)


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    image = torch.rand(1, 3, 150, 150, generator=torch.Generator().manual_seed(0))
    kernel = random_motion_kernel(9, seed=0)
    options = {"kernel": None, "kernel_size": 9, "steps": 1, "tile": 80, "seed": 0}
    calls = []

    def counting(part, known, seed, callback, limit=99):
        if len(calls) >= limit:
            raise KeyboardInterrupt
        calls.append(seed)
        return exact(torch.clone, kernel)(part, known, seed, callback)

    whole = solve_in_tiles(image, counting, **options)
    count = len(calls)
    calls.clear()
    kept = {"checkpoint": tmp_path / "tiles", "key": "mine"}
    with pytest.raises(KeyboardInterrupt):
        solve_in_tiles(image, lambda *a: counting(*a, limit=3), **options, **kept)
    again = solve_in_tiles(image, counting, **options, **kept)
    assert len(calls) == count and len(set(calls)) == count  # nothing twice
    assert torch.equal(again.image, whole.image)
    assert again.state.history == whole.state.history
    # What belongs to another request, or was cut off, is not used.
    calls.clear()
    (tmp_path / "tiles" / "tile-0000.safetensors").write_bytes(b"cut")
    solve_in_tiles(image, counting, **options, **kept)
    assert len(calls) == 1
    solve_in_tiles(image, counting, **options, **(kept | {"key": "other"}))
    assert len(calls) == 1 + count


@pytest.fixture(scope="module")
def blurred():
    kernel = random_motion_kernel(9, seed=3)
    scene = photograph_crop("coffee", 208)
    return ext.blur_conv2d(scene, kernel, boundary="valid"), scene[..., 4:-4, 4:-4], kernel


def test_tiles_restore_as_well_as_the_whole(blurred):
    observed, truth, kernel = blurred
    settings = ProxSettings(steps=4, chains=1)
    psnr = {}
    for tile in (None, 120):
        found = latentdem.deblur(
            observed, kernel=kernel, noise_std=0.01, tile=tile, settings=settings
        )
        assert found.image.shape == observed.shape
        assert len(found.report["tiles"]) == (tile is not None)
        psnr[tile] = aligned_psnr(found.image, truth, margin=8, search=2)[0]
    before = aligned_psnr(observed, truth, margin=8, search=2)[0]
    assert psnr[None] > before + 2
    assert psnr[120] > psnr[None] - 0.3


def test_blind_tiles_share_one_kernel(blurred):
    found = latentdem.deblur(blurred[0], kernel_size=9, tile=120, settings=QUICK)
    (report,) = found.report["tiles"]
    assert len(report["tiles"]) == 4 and report["window"][2:] == (120, 120)
    assert float(found.kernel.sum()) == pytest.approx(1, abs=1e-5)
    json.dumps(found.report)
    grey = latentdem.deblur(blurred[0][:, :1], kernel_size=9, tile=120, settings=QUICK)
    assert grey.image.shape[1] == 1


def test_the_kernel_alone_takes_fewer_steps(blurred):
    """Reports count on without a gap, and tiles take all the steps that were asked for."""
    reports = []
    settings = replace(QUICK, steps=10, chains=2)
    found = latentdem.deblur(
        blurred[0],
        kernel_size=9,
        tile=120,
        settings=settings,
        progress=lambda index, count, report: reports.append(report),
    )
    assert {report.steps for report in reports} == {8 + 4 * 10}
    assert [report.step for report in reports] == list(range(8 + 4 * 10))
    assert found.report["network_evaluations"] == 8 + 4 * 10 * 2
    paper = PaperSettings(steps=20, every=20, last=1)
    assert for_kernel_alone(paper) is paper
    assert for_kernel_alone(QUICK).steps == 2


def test_the_published_method_in_tiles(blurred):
    settings = PaperSettings(steps=2, every=1, last=1)
    found = latentdem.deblur(blurred[0], kernel_size=9, tile=120, method="paper", settings=settings)
    assert found.image.shape == blurred[0].shape


def test_small_or_circular_photographs_are_not_cut(blurred):
    assert latentdem.deblur(blurred[0], kernel_size=9, settings=QUICK).report["tiles"] == []
    circular = latentdem.deblur(
        blurred[0], kernel_size=9, tile=64, boundary="circular", settings=QUICK
    )
    assert circular.report["tiles"] == []
    with pytest.raises(ValueError, match="tile must be at least 64 pixels"):
        latentdem.deblur(blurred[0], tile=10)


def test_command_goes_on_after_a_kill(blurred, tmp_path, monkeypatch):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    to_pil(blurred[0][0]).save(photo)
    command = ["deblur", str(photo), "-o", str(out), "--kernel-size", "9", "--steps", "1",
               "--tile", "120"]  # fmt: skip
    real, calls = together.run_prox, []

    def killed(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(together, "run_prox", killed)
    assert CliRunner().invoke(cli.app, command).exit_code != 0
    assert len(list((out / cli.TILES).rglob("*.safetensors"))) == 2
    assert not (out / "report.json").exists()
    done = []
    monkeypatch.setattr(together, "run_prox", lambda *a, **o: done.append(1) or real(*a, **o))
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert len(done) == 3  # four tiles and a kernel in all
    assert (out / "restored.png").exists() and not (out / cli.TILES).exists()
    # Killed between the last tile and the end, and watched: nothing is left to be drawn.
    (out / "report.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(cli.shutil, "rmtree", lambda *_, **__: None)
        assert CliRunner().invoke(cli.app, command).exit_code == 0
    (out / "report.json").unlink()
    result = CliRunner().invoke(cli.app, [*command, "--trace"])
    assert result.exit_code == 0 and (out / "report.json").exists(), result.output
    fresh = tmp_path / "fresh"
    assert CliRunner().invoke(cli.app, [*command[:3], str(fresh), *command[4:]]).exit_code == 0
    assert (fresh / "restored.png").read_bytes() == (out / "restored.png").read_bytes()


def test_key_tells_requests_apart():
    image, kernel = torch.rand(1, 3, 8, 8), torch.ones(1, 1, 3, 3) / 9
    keys = {
        tiles.request_key(image, None, {"seed": 0}),
        tiles.request_key(image, None, {"seed": 1}),
        tiles.request_key(image, kernel, {"seed": 0}),
        tiles.request_key(image + 0.1, None, {"seed": 0}),
    }
    assert len(keys) == 4
