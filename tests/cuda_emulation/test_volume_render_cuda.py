"""The CUDA path of volume rendering, emulated, against the plain torch reference and the CPU."""

import pytest
import torch
from ops.test_volume_render import F64, PLAIN, SCENES, Scene, gradient, weigh

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

all_scenes = pytest.mark.parametrize("scene", SCENES, ids=str)
float_and_double = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
DENSE = Scene((3, 3, 4), image=(16, 21), samples=24)  # many rays through every cell


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def render(ops, *inputs, image_size, near, far, samples_per_ray, early_stop_eps=None):
    """The emulated operators, tied together for autograd."""

    class Render(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return ops.volume_render(
                *inputs, list(image_size), near, far, samples_per_ray, early_stop_eps
            )

        @staticmethod
        def backward(ctx, *grads):
            needs = ctx.needs_input_grad
            settings = (near, far, samples_per_ray, early_stop_eps)
            found = ops.volume_render_backward(
                *grads, *ctx.saved_tensors, *settings, needs[0], needs[1], needs[2] or needs[3]
            )
            return tuple(g if need else None for g, need in zip(found, needs, strict=True))

    return Render.apply(*inputs)


def results(ops, scene, dtype=torch.float32):
    """Three images and four gradients."""
    inputs = scene.tracked(dtype)
    outputs = render(ops, *inputs, **scene.options)
    return (*outputs, *torch.autograd.grad(weigh(outputs), inputs))


@all_scenes
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_forward(emulated, scene, dtype):
    inputs = scene.tensors(dtype)
    found = render(emulated, *inputs, **scene.options)
    for index, cpu in enumerate(ext.volume_render(*inputs, **scene.options)):
        assert_accurate(
            lambda *_, index=index: found[index],
            lambda *inputs, index=index: reference.volume_render(*inputs, **scene.options)[index],
            *inputs,
            slack=32,
        )
        bound = 1e-12 if cpu.dtype == F64 else 1e-5
        torch.testing.assert_close(found[index], cpu, rtol=bound, atol=bound)


@all_scenes
@float_and_double
def test_gradients(emulated, scene, dtype, deterministic):
    found = results(emulated, scene, dtype)[3:]
    density, *others = scene.tensors(F64)
    # What lies behind a sample is the ray's total less what lies before it, summed by two kernels
    # that round differently on a device: behind dense samples the difference is all that is left.
    in_the_open = gradient(reference.volume_render, 0, scene.options)(0 * density, *others)
    for index in range(4):
        assert_accurate(
            lambda *_, index=index: found[index],
            gradient(reference.volume_render, index, scene.options),
            *scene.tensors(dtype),
            slack=64,
            cancelled=float(in_the_open.abs().max()) if index == 0 else 0,
        )


@pytest.mark.parametrize("scene", [PLAIN, SCENES[2], DENSE], ids=str)
@float_and_double
def test_gradients_agree_with_the_cpu(emulated, scene, dtype, deterministic):
    inputs = scene.tracked(dtype)
    expected = torch.autograd.grad(weigh(ext.volume_render(*inputs, **scene.options)), inputs)
    bound = 1e-11 if dtype == F64 else 2e-4
    for a, b in zip(results(emulated, scene, dtype)[3:], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


@pytest.mark.parametrize("scene", [PLAIN, SCENES[2]], ids=str)
@pytest.mark.parametrize(
    "needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 1, 0)], ids=str
)
def test_only_the_gradients_that_are_needed(emulated, scene, needs, deterministic):
    inputs = scene.tensors(F64)
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(bool(need))
    wanted = [t for t in inputs if t.requires_grad]
    expected = torch.autograd.grad(weigh(reference.volume_render(*inputs, **scene.options)), wanted)
    found = torch.autograd.grad(weigh(render(emulated, *inputs, **scene.options)), wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scene", [DENSE, SCENES[2]], ids=str)
@float_and_double
def test_what_the_order_of_threads_changes(emulator, scene, dtype, deterministic):
    runs = []
    for seed in range(4):
        emulator.seed(seed)
        runs.append(results(emulator.operators, scene, dtype))
    grids = (3, 4)
    for index, (first, *others) in enumerate(zip(*runs, strict=True)):
        same = all(torch.equal(first, other) for other in others)
        # Floating-point atomics: only gradients in the grid depend on the order, and they do,
        # if it is a different one for sure.
        if deterministic or index not in grids:
            assert same
        elif emulator.ordered:
            assert not same


def test_fixed_point_keeps_small_gradients(emulated):
    # Gradients in density a million times those in colour, and the other way round.
    torch.use_deterministic_algorithms(True)
    try:
        for scale in (1e-6, 1e6):
            density, color, pose, lens = PLAIN.tensors()
            inputs = [t.requires_grad_() for t in (density, scale * color, pose, lens)]
            found, expected = (
                torch.autograd.grad(f(*inputs, **PLAIN.options)[0].sum(), inputs)
                for f in (lambda *i, **o: render(emulated, *i, **o), ext.volume_render)
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_not_hidden(emulated, value, deterministic):
    inputs = PLAIN.tracked(torch.float32)
    outputs = render(emulated, *inputs, **PLAIN.options)
    weight = torch.ones_like(outputs[1])
    weight[0, 0, 4, 5] = value
    grad_density, grad_color, *cameras = torch.autograd.grad(outputs[1], inputs, weight)
    assert not grad_density.isfinite().all()
    assert all(not camera[0].isfinite().all() for camera in cameras)
    if deterministic:
        assert grad_density.isnan().all()
        assert grad_color.abs().max() == 0


def test_rays_that_miss(emulated, deterministic):
    density, color, pose, lens = PLAIN.tracked()
    away = pose @ ext.convert_pose(torch.eye(4, dtype=F64), "opencv", "opengl")
    outputs = render(emulated, density, color, away, lens, **PLAIN.options)
    assert all(o.abs().max() == 0 for o in outputs)
    grads = torch.autograd.grad(weigh(outputs), (density, color, pose, lens))
    assert all(g.abs().max() == 0 for g in grads)


def test_a_camera_that_is_not_finite_gives_nan(emulated):
    density, color, pose, lens = PLAIN.tracked()
    scale = torch.ones(2, 1, 1, dtype=F64)
    scale[1] = 0  # no direction
    outputs = render(emulated, density, color, pose * scale, lens, **PLAIN.options)
    for out in outputs:
        assert out[0].isfinite().all()
        assert out[1].isnan().all()
    grads = torch.autograd.grad(weigh(outputs), (density, lens))
    assert grads[0].isfinite().all()
    assert grads[1][0].isfinite().all()
    assert grads[1][1].isnan().all()


def test_early_stop(emulated):
    scene = Scene((6, 6, 6), samples=200)
    density, color, pose, lens = scene.tensors(F64)
    inputs = [t.requires_grad_() for t in (60 * density, color, pose, lens)]
    options = scene.options | {"early_stop_eps": 0.05}
    runs = []
    for function in (lambda *i, **o: render(emulated, *i, **o), ext.volume_render):
        outputs = function(*inputs, **options)
        runs.append((*outputs, *torch.autograd.grad(weigh(outputs), inputs)))
    never = reference.volume_render(*inputs, **scene.options)
    assert 1e-4 < (never[1] - runs[0][1]).abs().max() < 0.05
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(b.detach().abs().max()))


def test_negative_density_is_taken_at_its_word(emulated, deterministic):
    density, color, pose, lens = PLAIN.tensors(F64)
    inputs = [t.requires_grad_() for t in (density - 2, color, pose, lens)]
    runs = []
    for function in (lambda *i, **o: render(emulated, *i, **o), reference.volume_render):
        outputs = function(*inputs, **PLAIN.options)
        runs.append((*outputs, *torch.autograd.grad(weigh(outputs), inputs)))
    assert runs[0][1].min() < 0
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_no_views_and_no_pixels(emulated):
    inputs = Scene((3, 4, 5), views=0).tracked()
    outputs = render(emulated, *inputs, **PLAIN.options)
    assert [o.shape for o in outputs] == [(0, 3, 9, 11), (0, 1, 9, 11), (0, 1, 9, 11)]
    images = [torch.empty(2, channels, 0, 4) for channels in (3, 1, 1)]
    for grads in (
        torch.autograd.grad(weigh(outputs), inputs),
        emulated.volume_render_backward(
            *images, *PLAIN.tensors(), 0.5, 4.7, 8, None, True, True, True
        ),
    ):
        assert all(grad.numel() == 0 or grad.abs().max() == 0 for grad in grads)
        assert grads[0].numel() > 0


def test_strides_and_dtypes_mix(emulated):
    density, color, pose, lens = PLAIN.tensors()
    plain = results(emulated, PLAIN)
    strided = (
        density.mT.contiguous().mT,
        color.contiguous(memory_format=torch.channels_last),
        pose.repeat_interleave(2, -1)[..., ::2],
        lens.mT.contiguous().mT,
    )
    for a, b in zip(plain, render(emulated, *strided, **PLAIN.options), strict=False):
        assert torch.equal(a, b)
    mixed = [density.half(), color.bfloat16(), pose.double(), lens.float()]
    mixed = [t.requires_grad_() for t in mixed]
    outputs = render(emulated, *mixed, **PLAIN.options)
    assert {o.dtype for o in outputs} == {torch.float32}
    grads = torch.autograd.grad(weigh(outputs), mixed)
    assert [g.dtype for g in grads] == [t.dtype for t in mixed]
    expected = torch.autograd.grad(weigh(ext.volume_render(*mixed, **PLAIN.options)), mixed)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * float(b.abs().max()))


def test_bad_arguments(emulated):
    density, color, pose, lens = PLAIN.tensors()
    with pytest.raises(ValueError, match=r"color must have shape \[3,D,H,W\]"):
        render(emulated, density, color[:2], pose, lens, **PLAIN.options)
    with pytest.raises(ValueError, match="image_size must be two positive sizes"):
        render(emulated, density, color, pose, lens, **PLAIN.options | {"image_size": (0, 3)})
    with pytest.raises(TypeError, match="density must be float32"):
        render(emulated, density.int(), color, pose, lens, **PLAIN.options)


def test_more_tiles_than_blocks(emulator):
    # Blocks take a second tile: 2^14 is the most that a launch has.
    emulator.seed(0)
    scene = Scene((2, 2, 2), views=2**14 + 5, image=(1, 1), samples=2)
    inputs = scene.tracked()
    expected = ext.volume_render(*inputs, **scene.options)
    expected = (*expected, *torch.autograd.grad(weigh(expected), inputs))
    for a, b in zip(results(emulator.operators, scene, F64), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()))
