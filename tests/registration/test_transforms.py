"""torch.func, vmap, autocast, compile with symbolic shapes, worker processes and fork."""

import multiprocessing
import os
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import latentdem_ext as ext
from latentdem_ext import reference


def scene(batch=2, channels=3, size=(12, 10), kernel=(1, 1, 4, 3), dtype=torch.float64):
    image = torch.rand(batch, channels, *size, dtype=dtype)
    taps = torch.rand(kernel, dtype=dtype)
    return image, taps, torch.rand_like(image)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_func_grad_is_backward(argument):
    inputs = scene()

    def loss(*tensors):
        return ext.blur_data_term(*tensors, boundary="reflect").sum()

    found = torch.func.grad(loss, argnums=argument)(*inputs)
    tracked = [t.clone().requires_grad_(i == argument) for i, t in enumerate(inputs)]
    (expected,) = torch.autograd.grad(loss(*tracked), tracked[argument])
    torch.testing.assert_close(found, expected)


def test_gradients_without_a_graph_say_so():
    image, kernel, observation = (t.requires_grad_() for t in scene())
    windows = ext.blend_windows(12, 10, 2, 2, 3).double()
    kernels = kernel.expand(2, 4, 4, 3)
    for found in (
        ext.blur_gradients(image, kernel, observation),
        ext.varying_blur_gradients(image, kernels, windows, observation),
    ):
        assert not any(t.requires_grad for t in found)
        with pytest.raises(RuntimeError, match="does not require grad"):
            found[0].sum().backward()


def test_func_hessian_vector_product():
    image, kernel, observation = scene(1, 1)

    def loss(taps):
        return ext.blur_data_term(image, taps, observation).sum()

    direction = torch.rand_like(kernel)

    def slope(taps):
        return (torch.func.grad(loss)(taps) * direction).sum()

    found = torch.func.grad(slope)(kernel)
    # The loss is quadratic in the kernel: its Hessian is blur', blur.
    expected = torch.func.grad(
        lambda t: (reference.blur_conv2d(image, t) * reference.blur_conv2d(image, direction)).sum()
    )(kernel)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 2)])
@pytest.mark.parametrize("kernel_batch", [1, 2])
def test_vmap_joins_the_batch(dims, kernel_batch, boundary):
    count = 3
    image = torch.rand(count, 2, 3, 9, 8, dtype=torch.float64)
    kernel = torch.rand(count, kernel_batch, 1, 3, 4, dtype=torch.float64)
    image_in = image[0] if dims[0] is None else image.movedim(0, dims[0])
    kernel_in = kernel[0] if dims[1] is None else kernel.movedim(0, dims[1])

    def blur(x, k):
        return ext.blur_conv2d(x, k, boundary=boundary)

    found = torch.vmap(blur, in_dims=dims)(image_in, kernel_in)
    for i in range(count):
        expected = blur(image[0 if dims[0] is None else i], kernel[0 if dims[1] is None else i])
        torch.testing.assert_close(found[i], expected)
    residual = torch.rand_like(found)
    back = torch.vmap(
        lambda r, k: ext.blur_conv2d_adjoint(r, k, boundary=boundary), in_dims=(0, dims[1])
    )(residual, kernel_in)
    expected = ext.blur_conv2d_adjoint(
        residual[1], kernel[0 if dims[1] is None else 1], boundary=boundary
    )
    torch.testing.assert_close(back[1], expected)


@pytest.mark.parametrize("kernel_batch", [1, 2])
def test_per_sample_gradients(kernel_batch):
    images = torch.rand(4, 2, 1, 8, 9, dtype=torch.float64)
    kernel, observation = (
        torch.rand(kernel_batch, 1, 3, 3).double(),
        torch.rand(2, 1, 8, 9).double(),
    )
    mask = (torch.rand(1, 1, 8, 9) > 0.5).double()

    def loss(image, taps):
        return ext.blur_data_term(image, taps, observation, mask=mask).sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(images, kernel)
    for i, image in enumerate(images):
        expected = torch.func.grad(loss, argnums=(0, 1))(image, kernel)
        torch.testing.assert_close(found[0][i], expected[0])
        torch.testing.assert_close(found[1][i], expected[1])


@pytest.mark.parametrize("operator", [ext.project_simplex, ext.recenter_kernel])
def test_projections_under_vmap_and_grad(operator):
    kernels = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(operator)(kernels), operator(kernels))
    weight = torch.rand(2, 5, 4, dtype=torch.float64)
    found = torch.vmap(torch.func.grad(lambda k: (operator(k) * weight).sum()))(kernels)
    tracked = kernels.clone().requires_grad_()
    (operator(tracked) * weight).sum().backward()
    torch.testing.assert_close(found, tracked.grad)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(half):
    image, kernel, observation = scene(dtype=half)
    with torch.autocast("cpu", dtype=half):
        loss = ext.blur_data_term(image, kernel, observation)
        blurred = ext.blur_conv2d(image, kernel)
    assert loss.dtype == blurred.dtype == torch.float32
    exact = reference.blur_conv2d(image.double(), kernel.double())
    torch.testing.assert_close(blurred.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_renders_in_float32(half):
    pose = ext.pose_from_spherical(torch.tensor([20.0]), torch.tensor([30.0]), 2.5)
    lens = ext.intrinsics_from_fov(torch.tensor([50.0]), (5, 6))
    inputs = [torch.rand(1, 6, 5, 4), torch.rand(3, 6, 5, 4), pose, lens]
    inputs = [t.to(half).requires_grad_() for t in inputs]
    options = {"image_size": (5, 6), "near": 1.0, "far": 4.0, "samples_per_ray": 20}
    with torch.autocast("cpu", dtype=half):
        color, opacity, depth = ext.volume_render(*inputs, **options)
    assert color.dtype == opacity.dtype == depth.dtype == torch.float32
    # What autocast casts, autograd sees: the operator itself would have kept the half tensors.
    assert {t.dtype for t in color.grad_fn.saved_tensors} == {torch.float32}
    grads = torch.autograd.grad(color.sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    rendered = reference.volume_render(*exact, **options)[0]
    torch.testing.assert_close(color.double(), rendered, rtol=1e-5, atol=1e-5)
    for found, expected in zip(grads, torch.autograd.grad(rendered.sum(), exact), strict=True):
        assert found.dtype == half
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_compile_with_symbolic_shapes():
    def step(image, kernel, observation):
        loss, grad_image, grad_kernel = ext.blur_gradients(image, kernel, observation)
        refined = ext.project_simplex(kernel - 0.01 * grad_kernel)
        return loss.sum() + ext.blur_data_term(image - 0.1 * grad_image, refined, observation).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((9, 12), (14, 11)):
        inputs = scene(size=size)
        torch.testing.assert_close(compiled(*inputs), step(*inputs))


class Blurs(Dataset):
    """Blurs its items in the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = torch.full((1, 1, 64, 64), float(index))
        return ext.blur_conv2d(image, torch.ones(1, 1, 11, 11) / 121)[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_dataloader_workers():
    ext.blur_conv2d(torch.rand(4, 3, 128, 128), torch.rand(1, 1, 3, 3))  # threads exist already
    batches = list(DataLoader(Blurs(), batch_size=2, num_workers=2))
    torch.testing.assert_close(torch.cat(batches)[:, 0, 5, 5], torch.arange(4.0))


def _blur_in_child(size):
    ext.blur_conv2d(torch.rand(8, 3, 128, 128), torch.rand(1, 1, size, size))
    os._exit(7)


@pytest.mark.parametrize("size", [3, 21])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fork_after_threads_were_used(size):
    # GNU OpenMP's pool does not survive a fork; a loop that waits for it would hang.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ext.blur_conv2d(torch.rand(8, 3, 128, 128), torch.rand(1, 1, size, size))
        child = multiprocessing.get_context("fork").Process(target=_blur_in_child, args=(size,))
        child.start()
        deadline = time.monotonic() + 20
        while child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if child.is_alive():
            child.kill()
            pytest.fail("the forked child hangs")
        assert child.exitcode == 7
    finally:
        torch.set_num_threads(threads)
