"""Kernel estimation in plain torch; see :mod:`latentdem_ext.ops.kernel_map`.

The least squares of the support-exact path are solved densely, which is exact and slow: the
native solver is tested against it at convergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem_ext.ops.kernel_map import KernelDenoiser


def _fields(image: Tensor, domain: str, window: Tensor | None) -> Tensor:
    if domain == "gradient":
        down = image.roll(-1, -2) - image
        right = image.roll(-1, -1) - image
        image = torch.cat([down, right], 1)
    return image if window is None else image * window


def _noise_lags(kh: int, kw: int, domain: str, like: Tensor) -> Tensor:
    lags = like.new_zeros(2 * kh - 1, 2 * kw - 1)
    lags[kh - 1, kw - 1] = 4 if domain == "gradient" else 1
    if domain == "gradient":
        for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if abs(dy) < kh and abs(dx) < kw:
                lags[kh - 1 + dy, kw - 1 + dx] = -1
    return lags


def _noise_power(image: Tensor, window: Tensor | None, variance: float) -> Tensor:
    batch, channels, height, width = image.shape
    if window is None:
        return image.new_full((batch,), variance * channels * height * width)
    return variance * channels * window.square().sum((1, 2, 3)).expand(batch)


def _lag(fields: Tensor, other: Tensor, dy: int, dx: int, wrap: bool) -> Tensor:
    """``sum_p fields[p] other[p + (dy, dx)]`` per image."""
    moved = other.roll((-dy, -dx), (-2, -1))
    if not wrap:
        height, width = other.shape[-2:]
        moved = moved.clone()
        if dy > 0:
            moved[..., height - dy :, :] = 0
        elif dy < 0:
            moved[..., :-dy, :] = 0
        if dx > 0:
            moved[..., width - dx :] = 0
        elif dx < 0:
            moved[..., :-dx] = 0
    return (fields * moved).sum((1, 2, 3))


def kernel_map_statistics(
    image: Tensor,
    observation: Tensor,
    kernel_size: tuple[int, int],
    *,
    domain: str = "image",
    window: Tensor | None = None,
    image_variance: float = 0.0,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lags of the auto- and cross-correlation, one by one."""
    kh, kw = kernel_size
    x, y = _fields(image, domain, window), _fields(observation, domain, window)
    wrap = window is None
    auto = [
        [_lag(x, x, i - kh + 1, j - kw + 1, wrap) for j in range(2 * kw - 1)]
        for i in range(2 * kh - 1)
    ]
    cross = [[_lag(x, y, i - kh // 2, j - kw // 2, wrap) for j in range(kw)] for i in range(kh)]
    lags = torch.stack([torch.stack(row, -1) for row in auto], -2)
    noise = _noise_power(image, window, image_variance)
    lags = lags + noise[:, None, None] * _noise_lags(kh, kw, domain, image)
    return lags, torch.stack([torch.stack(row, -1) for row in cross], -2)


def kernel_map_prepare(
    observation: Tensor,
    kernel_size: tuple[int, int],
    *,
    domain: str = "image",
    window: Tensor | None = None,
) -> Tensor:
    """Nothing to prepare: an empty tensor."""
    fields = _fields(observation, domain, window)
    return fields.new_empty(*fields.shape[:2], 0)


def kernel_map_solve(
    autocorrelation: Tensor,
    crosscorrelation: Tensor,
    target: Tensor,
    start: Tensor,
    *,
    alpha: float,
    steps: int = 0,
) -> Tensor:
    """The exact solution; ``start`` and ``steps`` are not needed for it."""
    batch, kh, kw = crosscorrelation.shape
    rows = torch.arange(kh).repeat_interleave(kw)
    columns = torch.arange(kw).repeat(kh)
    dy = rows[:, None] - rows[None, :] + kh - 1
    dx = columns[:, None] - columns[None, :] + kw - 1
    matrix = autocorrelation[:, dy, dx] + alpha * torch.eye(kh * kw, dtype=target.dtype)
    rhs = (crosscorrelation + alpha * target).reshape(batch, kh * kw, 1)
    # One by one: after torch.set_num_threads() a batched solve of large matrices never returns, as
    # each of its threads waits for a team of its own inside LAPACK.
    solutions = [torch.linalg.solve(m, r) for m, r in zip(matrix, rhs, strict=True)]
    return torch.stack(solutions).reshape(batch, kh, kw) if batch else torch.zeros_like(target)


def _grid_size(n: int) -> int:
    """Next even length without prime factors above 7: the grid of a windowed full solve."""
    n += n % 2
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def _normalize(kernel: Tensor, fallback: Tensor) -> Tensor:
    positive = kernel.clamp_min(0)
    total = positive.sum((-2, -1), keepdim=True)
    nothing = total == 0
    return torch.where(nothing, fallback, positive / torch.where(nothing, 1.0, total))


def _prior_step(kernel: Tensor, prior: str | KernelDenoiser, weight: float, beta: float) -> Tensor:
    if callable(prior):
        return prior(kernel, (weight / beta) ** 0.5)
    if prior == "l1":
        return _normalize(kernel - weight / beta, kernel)
    if prior == "l2":
        return _normalize(kernel * beta / (2 * weight + beta), kernel)
    return kernel


def kernel_map_update(
    image: Tensor,
    observation: Tensor,
    kernel: Tensor,
    *,
    noise_std: float,
    penalty: float,
    regularization: float,
    iterations: int,
    prior: str | KernelDenoiser = "l1",
    domain: str = "image",
    support_exact: bool = True,
    window: Tensor | None = None,
    image_variance: float = 0.0,
    solver_steps: int = 0,
    prepared: Tensor | None = None,
) -> Tensor:
    """Half-quadratic splitting with exact least squares, or on the full grid with a crop."""
    alpha = noise_std**2 * penalty
    kh, kw = kernel.shape[-2:]
    split = kernel
    if support_exact:
        lags, rhs = kernel_map_statistics(
            image,
            observation,
            (kh, kw),
            domain=domain,
            window=window,
            image_variance=image_variance,
        )
        for _ in range(iterations):
            solution = kernel_map_solve(lags, rhs, split[:, 0], split[:, 0], alpha=alpha)
            estimate = _normalize(solution[:, None], split)
            split = _prior_step(estimate, prior, regularization, penalty)
        return estimate
    size = list(image.shape[-2:])
    if window is not None:
        size = [_grid_size(size[0] + kh - 1), _grid_size(size[1] + kw - 1)]
    x = torch.fft.fft2(_fields(image, domain, window), size)
    y = torch.fft.fft2(_fields(observation, domain, window), size)
    power = x.abs().square().sum(1)
    cross = (x.conj() * y).sum(1)
    noise = _noise_power(image, window, image_variance)[:, None, None]
    fy = torch.fft.fftfreq(size[0], dtype=image.dtype)[:, None]
    fx = torch.fft.fftfreq(size[1], dtype=image.dtype)[None, :]
    gradient = 4 - 2 * torch.cos(2 * torch.pi * fy) - 2 * torch.cos(2 * torch.pi * fx)
    filters = gradient if domain == "gradient" else torch.ones_like(gradient)
    for _ in range(iterations):
        grid = image.new_zeros(image.shape[0], *size)
        grid[:, :kh, :kw] = split[:, 0]
        z = torch.fft.fft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))
        k = (cross + alpha * z) / (power + noise * filters + alpha)
        field = torch.fft.ifft2(k).real.roll((kh // 2, kw // 2), (-2, -1))
        estimate = _normalize(field[:, None, :kh, :kw], split)
        split = _prior_step(estimate, prior, regularization, penalty)
    return estimate


def project_simplex(kernel: Tensor) -> Tensor:
    """Sort-based Euclidean projection onto the probability simplex."""
    flat = kernel.flatten(-2)
    flat = flat - flat.amax(-1, keepdim=True)  # which does not move the projection
    ordered = flat.sort(-1, descending=True).values
    count = torch.arange(1, flat.shape[-1] + 1, dtype=kernel.dtype)
    candidates = (ordered.cumsum(-1) - 1) / count
    active = (ordered > candidates).sum(-1, keepdim=True)
    shift = candidates.gather(-1, (active - 1).clamp_min(0))
    projected = (flat - shift).clamp_min(0)
    finite = flat.isfinite().all(-1, keepdim=True)
    return torch.where(finite, projected, torch.nan).reshape(kernel.shape)


def recenter_kernel(kernel: Tensor, *, subpixel: bool = True) -> Tensor:
    """Shift the centre of mass to the kernel's centre by two bilinear interpolation matrices."""
    kh, kw = kernel.shape[-2:]
    rows = torch.arange(kh, dtype=kernel.dtype)
    columns = torch.arange(kw, dtype=kernel.dtype)
    total = kernel.sum((-2, -1))
    mass = torch.where(total == 0, 1, total)
    dy = kh // 2 - (kernel.sum(-1) * rows).sum(-1) / mass
    dx = kw // 2 - (kernel.sum(-2) * columns).sum(-1) / mass
    centred = (total.abs() > 0) & (dy.abs() <= kh) & (dx.abs() <= kw)
    if not subpixel:
        # Halves are rounded away from zero, as std::round does.
        dy, dx = ((d.abs() + 0.5).floor() * d.sign() for d in (dy.detach(), dx.detach()))

    def matrix(grid: Tensor, shift: Tensor) -> Tensor:
        distance = grid[:, None] - grid[None, :] - shift[..., None, None]
        return (1 - distance.abs()).clamp_min(0)

    moved = matrix(rows, dy) @ kernel @ matrix(columns, dx).transpose(-2, -1)
    kept = moved.sum((-2, -1))
    centred = centred & (kept.abs() > 0)
    moved = moved * (total / torch.where(centred, kept, 1))[..., None, None]
    return torch.where(centred[..., None, None], moved, kernel)
