"""Every operator on a GPU: as on the CPU, inside a CUDA graph, and without waiting for the host."""

import pytest
import torch
from registration.test_dispatcher import OPERATORS, arguments

from latentdem_ext.ops import _transforms

pytestmark = pytest.mark.needs_cuda
DEVICE = "cuda"
# What kernel_map_prepare returns is each device's own.
COMPARABLE = [name for name in OPERATORS if name != "kernel_map_prepare"]
DIFFERENTIABLE = [
    operator._schema.name.removeprefix("latentdem::")
    for operator in _transforms._functions
    if operator != torch.ops.latentdem.volume_render_backward.default
]


def moved(values, dtype):
    return tuple(
        value.to(DEVICE, dtype) if isinstance(value, torch.Tensor) else value for value in values
    )


def call(name, values):
    found = getattr(torch.ops.latentdem, name)(*values)
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def host_arguments(name, dtype):
    return tuple(v.to(dtype) if isinstance(v, torch.Tensor) else v for v in arguments(name))


@pytest.mark.parametrize("name", COMPARABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_on_the_cpu(name, dtype):
    values = host_arguments(name, dtype)
    bound = 1e-3 if dtype == torch.float32 else 1e-9
    for left, right in zip(call(name, values), call(name, moved(values, dtype)), strict=True):
        assert right.is_cuda and right.dtype == left.dtype
        scale = float(left.abs().max()) if left.numel() else 0.0
        torch.testing.assert_close(right.cpu(), left, rtol=bound, atol=bound * scale)


def gradients(name, values):
    tracked = [v.requires_grad_() for v in values if isinstance(v, torch.Tensor)]
    loss = sum(found.double().square().sum() for found in call(name, values))
    return torch.autograd.grad(loss, tracked, allow_unused=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_as_on_the_cpu(name):
    values = host_arguments(name, torch.float64)
    there = gradients(name, moved(values, torch.float64))
    for left, right in zip(gradients(name, values), there, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert right.is_cuda
            scale = float(left.abs().max())
            torch.testing.assert_close(right.cpu(), left, rtol=1e-8, atol=1e-8 * scale)


# torch says so once, when the mode is set.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", OPERATORS)
def test_never_waits_for_the_device(name):
    values = moved(arguments(name), torch.float32)
    call(name, values)  # plans and caches are made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPERATORS)
def test_inside_a_cuda_graph(name):
    values = moved(arguments(name), torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(name, values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(name, values)
    first = next(value for value in values if isinstance(value, torch.Tensor))
    first.mul_(0.5)
    graph.replay()
    for left, right in zip(captured, call(name, values), strict=True):
        scale = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", OPERATORS)
def test_on_a_stream_of_the_callers(name):
    values = moved(arguments(name), torch.float32)
    expected = call(name, values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call(name, values)
    stream.synchronize()
    for left, right in zip(found, expected, strict=True):
        scale = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * scale)


def test_devices_are_not_mixed():
    image, kernel = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 3, 3, device=DEVICE)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        torch.ops.latentdem.blur_conv2d(image.to(DEVICE), kernel.cpu(), "circular")
