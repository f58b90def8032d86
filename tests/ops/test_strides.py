"""Images are read where they lie: the same bits from any layout, and no copy on the way."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.samples import BOUNDARIES, SMALL, SPECTRAL, Sample
from torch.profiler import ProfilerActivity, profile

import latentdem_ext as ext

ROOT = Path(__file__).resolve().parents[2]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def transposed(t):
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def every_second(t):
    return t.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, 1::2]


def part_of_a_larger_one(t):
    larger = torch.full((*t.shape[:2], t.shape[2] + 3, t.shape[3] + 5), torch.nan).to(t)
    view = larger[..., 1 : 1 + t.shape[2], 2 : 2 + t.shape[3]]
    return view.copy_(t)


def constant_columns(t):
    return t[..., :1].expand(t.shape)


def shared_by_the_batch(t):
    return t[:1].expand(t.shape)


LAYOUTS = [
    channels_last,
    transposed,
    every_second,
    part_of_a_larger_one,
    constant_columns,
    shared_by_the_batch,
]
all_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


def assert_same(found, expected):
    found, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, expected))
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("sample", [SMALL[0], SPECTRAL[0], SPECTRAL[1]], ids=str)
@all_boundaries
@all_layouts
def test_blur_gives_the_same_bits(sample, boundary, layout):
    image, kernel, observation, _ = sample.tensors(boundary)
    mask = torch.rand(observation.shape)
    # The values that the layout allows, in memory of their own.
    x, y, m = (layout(t) for t in (image, observation, mask))
    image, observation, mask = (t.contiguous().clone() for t in (x, y, m))
    assert not x.is_contiguous()
    size, taps = (image.shape[2], image.shape[3]), list(kernel.shape)
    kernel_adjoint = torch.ops.latentdem.blur_conv2d_kernel
    assert_same(
        ext.blur_conv2d(x, kernel, boundary=boundary),
        ext.blur_conv2d(image, kernel, boundary=boundary),
    )
    assert_same(
        ext.blur_conv2d_adjoint(y, kernel, boundary=boundary, image_size=size),
        ext.blur_conv2d_adjoint(observation, kernel, boundary=boundary, image_size=size),
    )
    assert_same(
        kernel_adjoint(x, y, boundary, taps), kernel_adjoint(image, observation, boundary, taps)
    )
    for weights, plain_weights in ((None, None), (m, mask)):
        for function in (ext.blur_data_term, ext.blur_gradients):
            assert_same(
                function(x, kernel, y, boundary=boundary, mask=weights),
                function(image, kernel, observation, boundary=boundary, mask=plain_weights),
            )


@pytest.mark.parametrize("sample", [SPECTRAL[0], SPECTRAL[1]], ids=str)
@all_layouts
def test_deconvolutions_give_the_same_bits(sample, layout):
    image, kernel, observation, _ = sample.tensors("circular")
    mask = torch.rand(observation.shape)
    x, y, m = (layout(t) for t in (image, observation, mask))
    image, observation, mask = (t.contiguous().clone() for t in (x, y, m))
    assert_same(
        ext.wiener_deconv2d(x, y, kernel, 0.1, mask=m[:, :1], passes=3),
        ext.wiener_deconv2d(image, observation, kernel, 0.1, mask=mask[:, :1], passes=3),
    )
    assert_same(
        ext.wiener_deconv2d(x, y, kernel, 0.1), ext.wiener_deconv2d(image, observation, kernel, 0.1)
    )
    for boundary in ("circular", "reflect"):
        assert_same(
            ext.richardson_lucy(y, kernel, iterations=3, initial=x, mask=m, boundary=boundary),
            ext.richardson_lucy(
                observation, kernel, iterations=3, initial=image, mask=mask, boundary=boundary
            ),
        )


@all_layouts
@pytest.mark.parametrize("domain", ["image", "gradient"])
def test_kernel_estimate_gives_the_same_bits(layout, domain):
    image, _, observation, _ = SPECTRAL[0].tensors("circular")
    x, y = layout(image), layout(observation)
    image, observation = x.contiguous().clone(), y.contiguous().clone()
    for window in (None, torch.rand(1, 1, *image.shape[2:])):
        settings = {"domain": domain, "window": window}
        assert_same(
            ext.kernel_map_statistics(x, y, (7, 6), **settings),
            ext.kernel_map_statistics(image, observation, (7, 6), **settings),
        )


@pytest.mark.parametrize("sample", [SMALL[0], SPECTRAL[0], SPECTRAL[1]], ids=str)
@all_boundaries
def test_results_keep_the_memory_format(sample, boundary):
    image, kernel, observation, mask = sample.tensors(boundary)
    ops, size = torch.ops.latentdem, list(image.shape[2:])
    x, y = channels_last(image), channels_last(observation)
    results = {
        "conv": ops.blur_conv2d(x, kernel, boundary),
        "adjoint": ops.blur_conv2d_adjoint(y, kernel, boundary, size),
        "gradient": ops.blur_gradients(x, kernel, y, mask, boundary)[1],
    }
    if boundary == "circular":
        results["wiener"] = ops.wiener_deconv2d(x, y, kernel, torch.tensor(0.1), mask, 2)
    for name, result in results.items():
        assert result.is_contiguous(memory_format=torch.channels_last), name
    assert ext.blur_conv2d(image, kernel, boundary=boundary).is_contiguous()
    assert ext.blur_conv2d(x[..., ::2], kernel[..., :1], boundary=boundary).is_contiguous()
    # The fake kernels say the same.
    tracked = (x.requires_grad_(), kernel.requires_grad_())
    torch.library.opcheck(ops.blur_conv2d, (*tracked, boundary))
    torch.library.opcheck(ops.blur_data_term, (*tracked, y, mask, boundary))
    torch.library.opcheck(ops.blur_conv2d_adjoint, (y, kernel, boundary, size))
    torch.library.opcheck(ops.blur_gradients, (x.detach(), kernel.detach(), y, mask, boundary))
    if boundary == "circular":
        torch.library.opcheck(
            ops.wiener_deconv2d, (*tracked[:1], y, kernel, torch.tensor(0.1), mask, 2)
        )


def allocated(function):
    """Bytes of all tensors made on the way, and the names of the operators that ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.events()
    return sum(max(e.self_cpu_memory_usage, 0) for e in events), {e.name for e in events}


@all_boundaries
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [channels_last, transposed, every_second])
def test_no_copy_is_made(boundary, masked, layout):
    sample = Sample((2, 3, 64, 48), (1, 1, 9, 8))
    image, kernel, observation, _ = sample.tensors(boundary)
    mask = layout(torch.rand(observation.shape)) if masked else None
    x, y = layout(image), layout(observation)
    gradients, names = allocated(
        lambda: ext.blur_gradients(x, kernel, y, boundary=boundary, mask=mask)
    )
    blur, more = allocated(lambda: ext.blur_conv2d(x, kernel, boundary=boundary))
    small = 4 * (kernel.numel() + 64)  # kernel gradient and loss, to the allocator's alignment
    assert image.nbytes <= gradients <= image.nbytes + small
    assert observation.nbytes <= blur <= observation.nbytes + 64
    assert not {"aten::copy_", "aten::clone"} & (names | more)
    loss, names = allocated(lambda: ext.blur_data_term(x, kernel, y, boundary=boundary, mask=mask))
    assert loss <= 64
    assert "aten::copy_" not in names


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("boundary", ["circular", "reflect"])
def test_scratch_memory_is_a_few_planes(boundary):
    """Resident memory at its peak, of which the profiler sees only tensors."""
    program = f"""
import sys, torch, latentdem_ext as ext
sys.path.insert(0, "python/benchmarks")
from common import peak_mebibytes
torch.set_num_threads(2)
x, y = (torch.rand(32, 3, 256, 256).contiguous(memory_format=torch.channels_last) for _ in "xy")
k = torch.rand(1, 1, 25, 25)
k /= k.sum()
print(peak_mebibytes(lambda: ext.blur_gradients(x, k, y, boundary={boundary!r})))
print(peak_mebibytes(lambda: ext.blur_conv2d(x, k, boundary={boundary!r})))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    image = 32 * 3 * 256 * 256 * 4 / 2**20
    for line in found.stdout.split():
        assert float(line) < 1.3 * image
