"""Deconvolution and spatially varying blur, against the best plain torch.

* ``wiener``: the masked proximal step of the E-step, with real transforms and the transfer
  function computed once; ``complex fft2`` is how it is usually published.
* ``richardson-lucy``: real transforms, kernel transformed once, in-place products.
* ``varying blur``: loss with both gradients; ``all patches`` transforms every patch at the
  image's size in one batch under autograd, ``windows`` cuts the patches out first.
* ``blur, then downsample``: strided ``conv2d``, and full blur by FFT.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, store
from torch import Tensor

import latentdem_ext as ext
from latentdem_ext import reference

Row = dict[str, Any]


def _transfer(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    kh, kw = kernel.shape[-2:]
    grid = F.pad(kernel, (0, size[1] - kw, 0, size[0] - kh))
    return torch.fft.rfft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))


def _row(case: str, times: dict[str, float]) -> Row:
    native = times["native"]
    ratios = {f"{k} / native": v / native for k, v in times.items() if k != "native"}
    return {"case": case, "milliseconds": times, "ratios": ratios}


def _agree(native: Any, plain: Any) -> None:
    for a, b in zip(native, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=2e-3 * float(b.detach().abs().max()))


# Wiener ---------------------------------------------------------------------------------


def wiener_rfft(
    image: Tensor, observed: Tensor, kernel: Tensor, ratio: float, mask: Tensor | None, passes: int
) -> Tensor:
    """Real transforms, everything that can be reused is."""
    size = (image.shape[-2], image.shape[-1])
    transfer = _transfer(kernel, size)
    gain = transfer.conj() / (transfer.abs().square() + ratio)
    spectrum = torch.fft.rfft2(image)
    if mask is None:
        change = gain * (torch.fft.rfft2(observed) - transfer * spectrum)
        return torch.fft.irfft2(spectrum.add_(change), s=size)
    base = mask * (observed - torch.fft.irfft2(transfer * spectrum, s=size))
    change = gain * torch.fft.rfft2(base)
    for _ in range(passes - 1):
        echo = torch.fft.irfft2(transfer * change, s=size)
        change = torch.fft.rfft2(torch.addcmul(base, 1 - mask, echo)).mul_(gain)
    return torch.fft.irfft2(change, s=size).add_(image)


def wiener_complex(
    image: Tensor, observed: Tensor, kernel: Tensor, ratio: float, mask: Tensor | None, passes: int
) -> Tensor:
    """Complex transforms."""
    size = (image.shape[-2], image.shape[-1])
    kh, kw = kernel.shape[-2:]
    grid = F.pad(kernel, (0, size[1] - kw, 0, size[0] - kh))
    transfer = torch.fft.fft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))
    gain = transfer.conj() / (transfer.abs().square() + ratio)
    prediction = torch.fft.ifft2(transfer * torch.fft.fft2(image)).real
    seen = 1.0 if mask is None else mask
    change = torch.zeros_like(gain)
    for index in range(passes):
        misfit = seen * (observed - prediction)
        if index > 0:
            misfit = misfit + (1 - seen) * torch.fft.ifft2(transfer * change).real
        change = gain * torch.fft.fft2(misfit)
    return image + torch.fft.ifft2(change).real


def bench_wiener(shape: tuple[int, ...], k: int, masked: bool) -> Row:
    """One proximal step; with a mask, three imputations."""
    image, observed = torch.rand(2, *shape)
    kernel = torch.rand(1, 1, k, k)
    kernel /= kernel.sum()
    mask = None
    if masked:
        mask = torch.zeros(1, 1, *shape[2:])
        mask[..., k:-k, k:-k] = 1
    arguments = (image, observed, kernel, 0.1, mask, 3 if masked else 1)

    def native() -> Tensor:
        return ext.wiener_deconv2d(*arguments[:4], mask=mask, passes=arguments[5])

    _agree([native()], [wiener_rfft(*arguments)])
    times = interleaved(
        {
            "native": native,
            "complex fft2": lambda: wiener_complex(*arguments),
            "rfft2": lambda: wiener_rfft(*arguments),
        }
    )
    what = "masked, 3 passes" if masked else "no mask"
    return _row(f"wiener {list(shape)}, kernel {k}, {what}", times)


def bench_wiener_gradients(shape: tuple[int, ...], k: int) -> Row:
    """Backward through the masked step, in image and kernel."""
    image, observed = torch.rand(2, *shape)
    image.requires_grad_()
    kernel = torch.rand(1, 1, k, k)
    kernel = (kernel / kernel.sum()).requires_grad_()
    mask = torch.zeros(1, 1, *shape[2:])
    mask[..., k:-k, k:-k] = 1

    def native() -> tuple[Tensor, ...]:
        x = ext.wiener_deconv2d(image, observed, kernel, 0.1, mask=mask, passes=3)
        return torch.autograd.grad(x.square().sum(), (image, kernel))

    def plain() -> tuple[Tensor, ...]:
        x = reference.wiener_deconv2d(image, observed, kernel, 0.1, mask=mask, passes=3)
        return torch.autograd.grad(x.square().sum(), (image, kernel))

    _agree(native(), plain())
    times = interleaved({"native": native, "rfft2 autograd": plain})
    return _row(f"wiener with gradients {list(shape)}, kernel {k}, masked, 3 passes", times)


# Richardson-Lucy ------------------------------------------------------------------------


def lucy_rfft(observed: Tensor, kernel: Tensor, iterations: int) -> Tensor:
    """Circular boundary, kernel sums to one."""
    size = (observed.shape[-2], observed.shape[-1])
    transfer = _transfer(kernel, size)
    adjoint = transfer.conj()
    image = observed.mean((-2, -1), keepdim=True).expand_as(observed).clone()
    for _ in range(iterations):
        prediction = torch.fft.irfft2(torch.fft.rfft2(image).mul_(transfer), s=size)
        quotient = observed / prediction.clamp_min_(1e-7)
        image.mul_(torch.fft.irfft2(torch.fft.rfft2(quotient).mul_(adjoint), s=size).clamp_min_(0))
    return image


def bench_lucy(shape: tuple[int, ...], k: int) -> Row:
    """Twenty iterations."""
    observed = torch.rand(shape) + 0.1
    kernel = torch.rand(1, 1, k, k)
    kernel /= kernel.sum()

    def native() -> Tensor:
        return ext.richardson_lucy(observed, kernel, iterations=20)

    _agree([native()], [lucy_rfft(observed, kernel, 20)])
    times = interleaved({"native": native, "rfft2": lambda: lucy_rfft(observed, kernel, 20)})
    return _row(f"richardson-lucy {list(shape)}, kernel {k}, 20 iterations", times)


# Spatially varying blur -----------------------------------------------------------------


def varying_all(
    image: Tensor, kernels: Tensor, weights: Tensor, observed: Tensor
) -> tuple[Tensor, ...]:
    """Every patch at the image's size; the products are summed before one inverse."""
    x, k = image.detach().requires_grad_(), kernels.detach().requires_grad_()
    size = (image.shape[-2], image.shape[-1])
    spectra = torch.fft.rfft2(x[:, :, None] * weights)
    blurred = torch.fft.irfft2((spectra * _transfer(k, size)).sum(2), s=size)
    loss = 0.5 * (blurred - observed).square().sum((1, 2, 3))
    return loss, *torch.autograd.grad(loss.sum(), (x, k))


def varying_windows(
    image: Tensor, kernels: Tensor, weights: Tensor, observed: Tensor
) -> tuple[Tensor, ...]:
    """Each patch cut out, blurred by FFT at its own size, and added, under autograd."""
    x, k = image.detach().requires_grad_(), kernels.detach().requires_grad_()
    height, width = image.shape[-2:]
    kh, kw = kernels.shape[-2:]
    total = x.new_zeros(*x.shape[:2], height + kh - 1, width + kw - 1)
    for kernel, weight in zip(k, weights, strict=True):
        rows, columns = weight.amax(1).nonzero()[:, 0], weight.amax(0).nonzero()[:, 0]
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        patch = x[..., top:bottom, left:right] * weight[top:bottom, left:right]
        filled = (bottom - top + kh - 1, right - left + kw - 1)
        grid = tuple(side + -side % 16 for side in filled)
        product = torch.fft.rfft2(patch, s=grid) * torch.fft.rfft2(kernel, s=grid)
        blurred = torch.fft.irfft2(product, s=grid)[..., : filled[0], : filled[1]]
        total[..., top : top + filled[0], left : left + filled[1]] += blurred
    centred = total[..., kh // 2 : kh // 2 + height, kw // 2 : kw // 2 + width]
    loss = 0.5 * (centred - observed).square().sum((1, 2, 3))
    return loss, *torch.autograd.grad(loss.sum(), (x, k))


def bench_varying(shape: tuple[int, ...], grid: int, k: int) -> list[Row]:
    """Loss and both gradients, for each baseline with the boundary that suits it."""
    image, observed = torch.rand(2, *shape)
    kernels = torch.rand(grid * grid, k, k)
    kernels /= kernels.sum((-2, -1), keepdim=True)
    weights = ext.blend_windows(shape[2], shape[3], grid, grid, shape[2] // (2 * grid))
    inputs = (image, kernels, weights, observed)
    rows = []
    for boundary, name, plain in (
        ("circular", "all patches", varying_all),
        ("zero", "windows", varying_windows),
    ):

        def native(boundary: str = boundary) -> tuple[Tensor, ...]:
            return ext.varying_blur_gradients(*inputs, boundary=boundary)

        _agree(native(), plain(*inputs))
        times = interleaved({"native": native, name: lambda plain=plain: plain(*inputs)}, 7)
        case = f"varying blur {list(shape)}, {grid} x {grid} kernels {k}, {boundary}"
        rows.append(_row(case, times))
    return rows


# Blur and downsampling ------------------------------------------------------------------


def bench_downsample(shape: tuple[int, ...], k: int, factor: int) -> Row:
    """Forward only, circular."""
    image = torch.rand(shape)
    kernel = torch.rand(1, 1, k, k)
    kernel /= kernel.sum()
    channels = shape[1]
    weight = kernel.flip(-2, -1).expand(channels, 1, k, k)
    before, after = k - 1 - k // 2, k // 2

    def native() -> Tensor:
        return ext.blur_downsample2d(image, kernel, factor)

    def strided() -> Tensor:
        padded = F.pad(image, (before, after, before, after), mode="circular")
        return F.conv2d(padded, weight, stride=factor, groups=channels)

    def spectral() -> Tensor:
        size = (shape[2], shape[3])
        blurred = torch.fft.irfft2(torch.fft.rfft2(image) * _transfer(kernel, size), s=size)
        return blurred[..., ::factor, ::factor].contiguous()

    _agree([native()], [strided()])
    times = interleaved({"native": native, "strided conv2d": strided, "rfft2": spectral})
    return _row(f"blur {k}, then downsample by {factor}, {list(shape)}", times)


def main() -> None:
    """Time all cases and store ``results/deconv.json``."""
    store(
        "deconv",
        [
            bench_wiener((4, 3, 320, 320), 25, masked=True),
            bench_wiener((8, 3, 256, 256), 25, masked=True),
            bench_wiener((8, 3, 256, 256), 33, masked=False),
            bench_wiener((1, 3, 1024, 1024), 65, masked=False),
            bench_wiener_gradients((4, 3, 320, 320), 25),
            bench_lucy((1, 3, 512, 512), 25),
            bench_lucy((8, 3, 256, 256), 33),
            *bench_varying((1, 3, 512, 512), 4, 25),
            *bench_varying((2, 3, 256, 256), 3, 15),
            bench_downsample((4, 3, 256, 256), 9, 4),
            bench_downsample((4, 3, 256, 256), 25, 4),
        ],
    )


if __name__ == "__main__":
    main()
