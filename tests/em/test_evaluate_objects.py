"""The objects suite: figures against known values, honest cases, resumable, fair summaries."""

import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from latentdem.cli import app
from latentdem.evaluate_object_methods import ROWS, Case, Outcome, build_methods
from latentdem.evaluate_objects import (
    HeldOutObjects,
    in_subset,
    measure,
    object_kind,
    run_objects_suite,
    seen_from,
    summarize,
    summary_table,
    turn_about_z,
)
from latentdem.metrics import psnr, silhouette_iou, structural_similarity
from latentdem.operators.radiance_field import RadianceField
from latentdem.training.object_views import on_white

QUIET = Console(quiet=True)
RADIUS = 0.5
NAMES = ["procedural-900000", "procedural-900001", "block-900-0", "block-901-0", "duck"]


def ball(side=24):
    """Red above and blue below: the same from every azimuth."""
    axis = torch.linspace(-0.75, 0.75, side)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    density = (800 * (RADIUS - (x * x + y * y + z * z).sqrt())).clamp(0, 60)[None]
    color = torch.stack(((z > 0).float(), torch.zeros_like(z), (z <= 0).float()))
    return RadianceField(density, color, 0.75)


def shard(objects):
    generator = torch.Generator().manual_seed(5)
    poses = torch.rand(objects, 12, 3, generator=generator)
    poses = poses * torch.tensor([60.0, 360.0, 0.8]) + torch.tensor([-10.0, -180.0, 2.2])
    images = []
    for of_object in poses:
        color, opacity, _ = ball().render(of_object, fov=40.0, image_size=32)
        straight = ((color - (1 - opacity)) / opacity.clamp_min(1e-3)).clamp(0, 1)
        images.append((torch.cat((straight, opacity), 1) * 255).round().to(torch.uint8))
    points = torch.randn(objects, 4000, 3, generator=generator)
    surface = RADIUS * points / points.norm(dim=-1, keepdim=True)
    return {"images": torch.stack(images), "poses": poses, "surface": surface}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tensors = shard(len(NAMES))
    for number, part in enumerate((slice(0, 3), slice(3, None))):
        save_file(
            {key: value[part].contiguous() for key, value in tensors.items()},
            folder / f"heldout-{number:03d}.safetensors",
            {"names": json.dumps(NAMES[part])},
        )
    return folder


def case_of(poses, views=1):
    """A case with given input ``poses``; what it shows does not matter."""
    poses = torch.tensor(poses)
    blank = torch.zeros(len(poses), 4, 32, 32, dtype=torch.uint8)
    return Case("x", 0, blank, poses, blank[:views], poses[:views], torch.zeros(0, 3))


def exact(case):
    return Outcome(case.poses, ball())


def turned(case):
    wrong = torch.tensor([0.0, 20.0, 0.1]).repeat(len(case.poses), 1)
    wrong[0] = 0
    return Outcome(case.poses + wrong, ball())


# Figures ------------------------------------------------------------------------------------


def test_rotation_error_of_known_turns():
    level = case_of([[0.0, 0.0, 2.5], [0.0, 60.0, 2.5], [0.0, -170.0, 2.5]])
    moved = level.poses + torch.tensor([[0.0, 0, 0], [0.0, 20, 0.2], [0.0, -25, 0]])
    figures, _ = measure(level, Outcome(moved, ball()), 40.0)
    assert figures["rotation"] == pytest.approx([20, 25], abs=1e-3)
    assert figures["radius"] == pytest.approx([0, 0.2, 0], abs=1e-6)
    # Half a turn on: the azimuth wraps, the error does not grow beyond 180.
    moved[1, 1] += 360
    moved[2, 1] = 20
    figures, _ = measure(level, Outcome(moved, ball()), 40.0)
    assert figures["rotation"] == pytest.approx([20, 170], abs=1e-2)


def test_rotation_error_is_relative_to_the_first_view():
    case = case_of([[10.0, 0.0, 2.5], [10.0, 0.0, 2.5]])
    both = case.poses + torch.tensor([7.0, 0.0, 0.1])
    figures, _ = measure(case, Outcome(both, ball()), 40.0)
    assert figures["rotation"] == pytest.approx([0], abs=1e-3)
    assert figures["first_elevation"] == pytest.approx(7, abs=1e-4)
    second = case.poses + torch.tensor([[0.0, 0, 0], [9.0, 0, 0]])
    figures, _ = measure(case, Outcome(second, ball()), 40.0)
    assert figures["rotation"] == pytest.approx([9], abs=1e-3)


def test_unseen_views_keep_their_place_relative_to_the_first():
    wanted = seen_from(
        torch.tensor([15.0, 0.0, 2.6]),
        torch.tensor([10.0, 0.0, 2.5]),
        torch.tensor([[10.0, 0.0, 2.5], [40.0, 179.0, 3.0]]),
    )
    expected = torch.tensor([[15.0, 0.0, 2.6], [45.0, 179.0, 3.1]])
    assert torch.allclose(wanted, expected, atol=1e-5)


def test_silhouette_iou_of_known_overlaps():
    a, b = torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
    a[0, :, :4], b[0, :, 2:6] = 1, 0.9  # 4 rows each, 2 common
    a[1, :, 0], b[1, :, 5] = 1, 1
    assert silhouette_iou(a, b).tolist() == pytest.approx([1 / 3, 0, 1])
    assert silhouette_iou(0.4 * a, b)[0] == 0


def test_structural_similarity_is_one_only_for_equal_images():
    image = torch.rand(2, 3, 16, 16)
    other = image.clone()
    other[1] = 1 - image[1]
    values = structural_similarity(other, image)
    assert values[0] == pytest.approx(1)
    assert values[1] < 0


def test_points_turn_from_x_to_y():
    turned_points = turn_about_z(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor(90.0))
    assert torch.allclose(turned_points, torch.tensor([[0.0, 1.0, 3.0]]), atol=1e-6)


# Cases --------------------------------------------------------------------------------------


def test_cases_are_seeded_disjoint_and_in_the_gauge_of_their_first_view(data):
    held_out = HeldOutObjects(data)
    case, again = (held_out.case("duck", 3, 1) for _ in range(2))
    assert torch.equal(case.inputs, again.inputs)
    assert case.poses[0, 1] == 0
    elevations = [*case.poses[:, 0].tolist(), *case.unseen_poses[:, 0].tolist()]
    assert len(set(elevations)) == 11
    assert not torch.equal(case.inputs, held_out.case("duck", 3, 2).inputs)
    stored = held_out.tensors["duck"]
    index = stored["poses"][:, 0].tolist().index(elevations[0])
    turn = stored["poses"][index, 1]
    # The surface turns with the cameras.
    back = turn_about_z(case.surface, turn)
    assert torch.allclose(back, stored["surface"], atol=1e-5)


def test_order_mixes_the_kinds_and_holds_every_object_once(data):
    names = HeldOutObjects(data).names
    assert sorted(names) == sorted(NAMES)
    assert {object_kind(name) for name in names[:2]} == {"procedural", "block"}
    assert object_kind("lego") == "textured"


def test_exact_outcome_is_close_to_the_truth_in_every_figure(data):
    case = HeldOutObjects(data).case("block-900-0", 2, 0)
    figures, views = measure(case, exact(case), 40.0)
    assert figures["psnr"] > 35
    assert figures["ssim"] > 0.99
    assert figures["iou"] > 0.98
    assert figures["chamfer"] < 0.02
    assert float(psnr(views, on_white(case.unseen)).min()) > 25
    smaller = RadianceField(ball().density, ball().color, 0.6)
    worse, _ = measure(case, Outcome(case.poses, smaller), 40.0)
    assert worse["psnr"] < figures["psnr"] - 5
    assert worse["iou"] == pytest.approx(0.64, abs=0.06)
    assert worse["chamfer"] == pytest.approx(0.1, abs=0.02)


def test_no_surface_is_said_not_averaged(data):
    case = HeldOutObjects(data).case("duck", 2, 0)
    empty = RadianceField(torch.zeros(1, 4, 4, 4), torch.zeros(3, 4, 4, 4), 0.75)
    figures, _ = measure(case, Outcome(case.poses, empty), 40.0)
    assert figures["chamfer"] is None and figures["no_surface"] is True
    assert figures["iou"] == 0


# The suite ----------------------------------------------------------------------------------


def gives_up(case):
    raise ValueError("the views contradict each other")


def test_suite_runs_resumes_and_refuses_another_setup(data, tmp_path):
    output = tmp_path / "quality.json"
    calls = []

    def counted(case):
        calls.append(case.name)
        return exact(case)

    options = {"data": data, "console": QUIET, "pictures": tmp_path / "pictures",
               "methods": {"true poses": counted, "grid": turned}}  # fmt: skip
    first = run_objects_suite(output, objects=1, counts=[2], seeds=1, **options)
    assert [r["row"] for r in first["rows"]] == ["true poses", "grid"]
    assert first["rows"][0]["seconds"] >= 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    marked = json.loads(output.read_text())
    marked["rows"][0]["seconds"] = 123.0
    output.write_text(json.dumps(marked))
    second = run_objects_suite(output, objects=2, counts=[2, 3], seeds=2, **options)
    assert len(second["rows"]) == 2 * 2 * 2 * 2
    assert len(calls) == 8  # none twice
    assert second["rows"][0]["seconds"] == 123.0
    rows = second["summary"]["triples"]
    assert rows["true poses"]["rotation_median"] == pytest.approx(0, abs=1e-3)
    assert rows["true poses"]["below_5"] == 1
    assert rows["grid"]["below_5"] == 0 and rows["grid"]["below_30"] == 1
    assert rows["grid"]["radius"] == pytest.approx(0.2 / 3, abs=1e-5)
    assert rows["grid"]["cases"] == 4 and rows["grid"]["psnr_std_over_seeds"] is not None
    marked["setup"]["unseen"] = 5
    output.write_text(json.dumps(marked))
    with pytest.raises(ValueError, match="holds another setup"):
        run_objects_suite(output, objects=1, **options)


def test_a_method_that_gives_up_is_recorded_and_counts_as_missed(data, tmp_path):
    document = run_objects_suite(
        tmp_path / "q.json", data=data, objects=1, counts=[3], seeds=1, console=QUIET,
        methods={"grid": gives_up},
    )  # fmt: skip
    assert document["rows"][0]["failed"] == "the views contradict each other"
    summary = document["summary"]["triples"]["grid"]
    assert summary["failed"] == 1 and summary["below_30"] == 0
    assert summary["psnr"] is None


def record(row, angle, azimuth=30.0, name="a", views=2):
    return {"row": row, "object": name, "views": views, "seed": 0, "rotation": [angle],
            "relative_azimuth": [azimuth], "radius": [0.0], "psnr": 20.0}  # fmt: skip


def test_rows_are_compared_on_common_cases_and_subsets():
    records = [
        record("grid", 3.0),
        record("true poses", 0.0),
        record("grid", 90.0, name="b"),  # the ceiling has not seen it yet
        record("grid", 10.0, azimuth=-120.0, name="c"),
        record("true poses", 0.0, azimuth=-120.0, name="c"),
    ]
    summary = summarize(records)
    assert list(summary) == ["pairs", "pairs within 90 degrees"]
    assert summary["pairs"]["grid"]["rotation_median"] == 6.5
    assert summary["pairs within 90 degrees"]["grid"]["rotation_median"] == 3.0
    assert math.isclose(summary["pairs"]["grid"]["below_5"], 0.5)
    table = summary_table("pairs", summary["pairs"], width=80)
    assert table.row_count == 2
    lost = {"row": "grid", "object": "d", "views": 2, "seed": 0, "failed": "no",
            "relative_azimuth": [10.0]}  # fmt: skip
    alone = summarize([record("grid", 3.0), lost])["pairs"]["grid"]
    assert alone["below_30"] == 0.5 and alone["failed"] == 1
    assert in_subset(record("grid", 0.0, views=3), "triples")


def test_wrong_options_are_refused(data, tmp_path):
    output = tmp_path / "q.json"
    with pytest.raises(ValueError, match="must be 2, 3 or both, found \\[4\\]"):
        run_objects_suite(output, data=data, counts=[4], console=QUIET)
    with pytest.raises(ValueError, match="objects and seeds must be positive, found 0"):
        run_objects_suite(output, data=data, objects=0, console=QUIET)
    with pytest.raises(FileNotFoundError, match="no heldout views in"):
        run_objects_suite(output, data=tmp_path, console=QUIET)
    with pytest.raises(ValueError, match=r"rows must be among one view, .*'two views'"):
        build_methods(["two views"])
    with pytest.raises(ValueError, match="needs a regressor"):
        build_methods(["feed-forward"])
    assert len(ROWS) == 7


def test_command_names_the_suites(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "-o", str(tmp_path / "q.json"), "--suite", "x"])
    assert result.exit_code == 1
    assert "suite must be deblur, synthetic, misspecified" in result.stderr
