"""The blur operators on a GPU: accuracy, parity with the CPU, CUDA graphs, streams."""

import pytest
import torch
from ops.samples import BOUNDARIES, SAMPLES, Sample

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

pytestmark = pytest.mark.needs_cuda
DEVICE = "cuda"
LARGE = [Sample((2, 3, 130, 97), (1, 1, 5, 5)), Sample((2, 3, 128, 128), (2, 1, 25, 25))]
all_samples = pytest.mark.parametrize("sample", [*SAMPLES, *LARGE], ids=str)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


@all_samples
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_forward(sample, boundary, dtype):
    image, kernel, _, _ = (t.to(DEVICE) for t in sample.tensors(boundary, dtype))
    assert_accurate(
        lambda x, k: ext.blur_conv2d(x, k, boundary=boundary),
        lambda x, k: reference.blur_conv2d(x, k, boundary=boundary),
        image,
        kernel,
        slack=32,
    )


@all_samples
@all_boundaries
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_agree_with_the_cpu(sample, boundary, masked, dtype):
    image, kernel, observation, mask = sample.tensors(boundary, dtype)
    mask = mask if masked else None
    host = ext.blur_gradients(image, kernel, observation, boundary=boundary, mask=mask)
    device = ext.blur_gradients(
        *(t.to(DEVICE) for t in (image, kernel, observation)),
        boundary=boundary,
        mask=None if mask is None else mask.to(DEVICE),
    )
    for left, right in zip(host, device, strict=True):
        bound = 256 * torch.finfo(dtype).eps
        atol = bound * float(left.abs().max())
        torch.testing.assert_close(right.cpu(), left, rtol=bound, atol=atol)


@pytest.mark.parametrize("sample", LARGE, ids=str)
@all_boundaries
def test_results_are_reproducible(sample, boundary):
    image, kernel, observation, mask = (t.to(DEVICE) for t in sample.tensors(boundary))
    first, second = (
        ext.blur_gradients(image, kernel, observation, boundary=boundary, mask=mask)
        for _ in range(2)
    )
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("sample", LARGE, ids=str)
@all_boundaries
def test_inside_a_cuda_graph(sample, boundary):
    image, kernel, observation, mask = (t.to(DEVICE) for t in sample.tensors(boundary))

    def step():
        return ext.blur_gradients(image, kernel, observation, boundary=boundary, mask=mask)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # transforms are planned outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    image.copy_(torch.rand_like(image))
    graph.replay()
    for left, right in zip(captured, step(), strict=True):
        assert torch.equal(left, right)


def test_gradcheck_on_the_device():
    image, kernel, observation, mask = (
        t.to(DEVICE) for t in SAMPLES[1].tensors("reflect", torch.float64)
    )
    assert torch.autograd.gradcheck(
        lambda x, k: ext.blur_data_term(x, k, observation, boundary="reflect", mask=mask),
        (image.requires_grad_(), kernel.requires_grad_()),
        fast_mode=True,
    )


def test_devices_must_agree():
    with pytest.raises(ValueError, match="kernel must be on the device of image"):
        ext.blur_conv2d(torch.rand(1, 1, 8, 8, device=DEVICE), torch.rand(1, 1, 3, 3))
