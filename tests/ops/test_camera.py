"""Camera helpers against each other, against matrix functions and against known poses."""

import math

import pytest
import torch

import latentdem_ext as ext
from latentdem_ext.ops.camera import CONVENTIONS

F64 = torch.float64


def random_twists(count=20, angle=3.0):
    twist = torch.randn(count, 6, dtype=F64)
    axis = twist[:, 3:] / twist[:, 3:].norm(dim=1, keepdim=True)
    return torch.cat((twist[:, :3], axis * torch.linspace(0, angle, count, dtype=F64)[:, None]), 1)


def generator_of(twist):
    x, y, z = twist[3:]
    zero = torch.zeros_like(x)
    rows = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero)).reshape(3, 3)
    return torch.cat((torch.cat((rows, twist[:3, None]), 1), torch.zeros(1, 4, dtype=F64)))


@pytest.mark.parametrize(
    ("elevation", "azimuth", "position", "right", "down"),
    [
        (0, 0, (2, 0, 0), (0, 1, 0), (0, 0, -1)),
        (0, 90, (0, 2, 0), (-1, 0, 0), (0, 0, -1)),
        (90, 0, (0, 0, 2), (0, 1, 0), (1, 0, 0)),
        (-90, 90, (0, 0, -2), (-1, 0, 0), (0, -1, 0)),
        (30, 180, (-math.sqrt(3), 0, 1), (0, -1, 0), (-0.5, 0, -math.sqrt(3) / 2)),
    ],
)
def test_known_poses(elevation, azimuth, position, right, down):
    angles = torch.tensor([elevation, azimuth], dtype=F64)
    pose = ext.pose_from_spherical(*angles, 2.0)
    known = torch.tensor([right, down, [-x / 2 for x in position], position], dtype=F64).mT
    torch.testing.assert_close(pose[:3], known, rtol=0, atol=1e-12)
    assert pose[3].tolist() == [0, 0, 0, 1]
    radians = ext.pose_from_spherical(*torch.deg2rad(angles), 2.0, degrees=False)
    torch.testing.assert_close(radians, pose)


def test_poses_are_rigid_and_look_at_the_origin():
    elevation = torch.linspace(-90, 90, 7, dtype=F64)[:, None]
    azimuth = torch.linspace(-180, 540, 9, dtype=F64)
    pose = ext.pose_from_spherical(elevation, azimuth, 3.0)
    assert pose.shape == (7, 9, 4, 4)
    rotation = pose[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=F64).expand(7, 9, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(7, 9, dtype=F64))
    torch.testing.assert_close(pose[..., :3, 3], -3 * pose[..., :3, 2])


def test_the_origin_is_in_the_middle_of_the_picture():
    density = torch.zeros(1, 33, 33, 33)
    density[0, 16, 16, 16] = 50
    pose = ext.pose_from_spherical(torch.tensor([25.0]), torch.tensor([70.0]), 2.5)
    lens = ext.intrinsics_from_fov(torch.tensor([40.0]), (9, 15))
    options = {"image_size": (9, 15), "near": 1.5, "far": 3.5, "samples_per_ray": 400}
    _, opacity, depth = ext.volume_render(density, torch.ones(3, 33, 33, 33), pose, lens, **options)
    assert opacity.flatten().argmax() == 4 * 15 + 7
    centre = (depth / opacity)[0, 0, 4, 7]
    torch.testing.assert_close(centre, torch.tensor(2.5), rtol=0, atol=0.1)


def test_spherical_round_trip():
    elevation = 178 * torch.rand(50, dtype=F64) - 89
    azimuth = 358 * torch.rand(50, dtype=F64) - 179
    radius = 1 + torch.rand(50, dtype=F64)
    pose = ext.pose_from_spherical(elevation, azimuth, radius)
    for found, given in zip(
        ext.spherical_from_pose(pose), (elevation, azimuth, radius), strict=True
    ):
        torch.testing.assert_close(found, given)


def test_relative_pose_wraps_and_composes():
    def pose(elevation, azimuth, radius):
        values = torch.tensor([elevation, azimuth], dtype=F64)
        return ext.pose_from_spherical(*values, radius)

    a, b, c = pose(10, 170, 2.0), pose(-20, -160, 1.5), pose(40, 20, 3.0)
    elevation, azimuth, radius = ext.relative_spherical(a, b)
    expected = torch.tensor([-30, 30, -0.5], dtype=F64)
    torch.testing.assert_close(torch.stack((elevation, azimuth, radius)), expected)
    there = torch.stack(ext.relative_spherical(a, c))
    detour = torch.stack(ext.relative_spherical(a, b)) + torch.stack(ext.relative_spherical(b, c))
    turn = torch.tensor([0, 360, 0], dtype=F64) * torch.round((detour - there)[1] / 360)
    torch.testing.assert_close(there, detour - turn)
    # zero123's get_T: polar angle arctan2(sqrt(x^2 + y^2), z), downward positive.
    condition = ext.zero123_condition(a, b)
    angle = math.radians(30)
    known = torch.tensor([angle, math.sin(angle), math.cos(angle), -0.5], dtype=F64)
    torch.testing.assert_close(condition, known)


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("target", CONVENTIONS)
def test_conventions_round_trip(source, target):
    pose = ext.convert_pose(ext.se3_exp(random_twists()), "opencv", source)
    there = ext.convert_pose(pose, source, target)
    assert there.shape[-2:] == ((3, 4) if target == "zero123" else (4, 4))
    torch.testing.assert_close(ext.convert_pose(there, target, source), pose)


def test_conventions_mean_what_they_say():
    pose = ext.pose_from_spherical(
        torch.tensor(30.0, dtype=F64), torch.tensor(40.0, dtype=F64), 2.0
    )
    opengl = ext.convert_pose(pose, "opencv", "opengl")
    torch.testing.assert_close(opengl[:3, 2], pose[:3, 3] / 2)  # backward, away from the origin
    assert opengl[2, 1] > 0  # image up is world up
    zero123 = ext.convert_pose(pose, "opencv", "zero123")
    origin = zero123 @ torch.tensor([0, 0, 0, 1], dtype=F64)
    torch.testing.assert_close(origin, torch.tensor([0, 0, -2], dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        ext.invert_pose(pose) @ pose, torch.eye(4, dtype=F64), atol=1e-12, rtol=0
    )


def test_intrinsics_see_the_field_of_view():
    lens = ext.intrinsics_from_fov(torch.tensor([60.0, 90.0], dtype=F64), (100, 200), axis="x")
    edge = torch.rad2deg(torch.atan((200 - lens[:, 2]) / lens[:, 0]))
    torch.testing.assert_close(edge, torch.tensor([30.0, 45.0], dtype=F64))
    assert lens[:, 2:].tolist() == [[100, 50], [100, 50]]
    radians = ext.intrinsics_from_fov(torch.tensor(math.pi / 2), (100, 200), degrees=False)
    torch.testing.assert_close(radians, torch.tensor([50.0, 50.0, 100.0, 50.0]))


def test_exponential_is_the_matrix_exponential():
    twists = random_twists()
    expected = torch.stack([torch.linalg.matrix_exp(generator_of(t)) for t in twists])
    torch.testing.assert_close(ext.se3_exp(twists), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.2, 0.23, 0.5, 2.0, 3.1, math.pi - 1e-7])
def test_logarithm_inverts_the_exponential(angle):
    twists = random_twists()
    twists[:, 3:] *= angle / twists[:, 3:].norm(dim=1, keepdim=True).clamp_min(1e-30)
    twists[0, 3:] = torch.tensor([0, 0, angle], dtype=F64)
    torch.testing.assert_close(ext.se3_log(ext.se3_exp(twists)), twists, rtol=0, atol=1e-11)


def test_coefficients_have_no_seam():
    # Both sides of the change from series to closed form, in value.
    square = torch.tensor([0.05 - 1e-13, 0.05 + 1e-13], dtype=F64)
    twists = torch.zeros(2, 6, dtype=F64)
    twists[:, 0], twists[:, 4] = 1.0, square.sqrt()
    below, above = ext.se3_exp(twists)
    torch.testing.assert_close(below, above, rtol=0, atol=2e-12)


def test_composition_of_commuting_motions():
    twist = random_twists()[7]
    torch.testing.assert_close(ext.se3_exp(0.3 * twist) @ ext.se3_exp(0.5 * twist),
                               ext.se3_exp(0.8 * twist))  # fmt: skip
    torch.testing.assert_close(ext.invert_pose(ext.se3_exp(twist)), ext.se3_exp(-twist))


@pytest.mark.parametrize("scale", [0.0, 1e-8, 0.1, 1.0])
def test_exponential_and_logarithm_gradients(scale):
    twist = (scale * random_twists(4, 2.0)).requires_grad_()
    assert torch.autograd.gradcheck(ext.se3_exp, (twist,))
    assert torch.autograd.gradgradcheck(ext.se3_exp, (twist,))

    def there_and_back(t):
        return ext.se3_log(ext.se3_exp(t))

    assert torch.autograd.gradcheck(there_and_back, (twist,))
    assert torch.autograd.gradgradcheck(there_and_back, (twist,))


def test_pose_gradients_at_the_poles_too():
    inputs = (
        torch.tensor([0.0, 35.0, 90.0, -90.0], dtype=F64, requires_grad=True),
        torch.tensor([0.0, -50.0, 120.0, 180.0], dtype=F64, requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(ext.pose_from_spherical, inputs)
    assert torch.autograd.gradgradcheck(ext.pose_from_spherical, inputs)
    lens = inputs[1].detach().abs().clamp(10, 80).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: ext.intrinsics_from_fov(f, (10, 20)), (lens,))
    pose = ext.pose_from_spherical(*(t.detach()[:2] for t in inputs)).requires_grad_()
    other = ext.se3_exp(random_twists()[5])
    assert torch.autograd.gradcheck(lambda p: ext.zero123_condition(p, other), (pose,))
    assert torch.autograd.gradcheck(lambda p: ext.convert_pose(p, "opencv", "zero123"), (pose,))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ext.se3_exp(torch.zeros(5)), r"twist must have shape \[...,6\], found \[5\]"),
        (lambda: ext.se3_log(torch.zeros(3, 4)), r"pose must have shape \[...,4,4\], found"),
        (lambda: ext.spherical_from_pose(torch.zeros(4, 3)), r"pose must have shape \[...,3\|4,4"),
        (lambda: ext.invert_pose(torch.zeros(4)), r"pose must have shape .*found \[4\]"),
        (
            lambda: ext.convert_pose(torch.eye(4), "opencv", "nerf"),
            "target must be one of opencv, opengl, zero123, found 'nerf'",
        ),
        (lambda: ext.convert_pose(torch.eye(4), "cv", "opengl"), "source must be one of .* 'cv'"),
        (
            lambda: ext.intrinsics_from_fov(torch.tensor(50.0), (0, 4)),
            r"image_size must be two positive sizes \(h, w\), found \(0, 4\)",
        ),
        (
            lambda: ext.intrinsics_from_fov(torch.tensor(50.0), (4, 4), axis="z"),
            "axis must be x or y, found 'z'",
        ),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(ValueError, match=text):
        call()
