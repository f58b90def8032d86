from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def blur_conv2d(image: Tensor, kernel: Tensor, boundary: str) -> Tensor: ...
def blur_conv2d_adjoint(
    residual: Tensor, kernel: Tensor, boundary: str, image_size: Sequence[int]
) -> Tensor: ...
def blur_conv2d_kernel(
    image: Tensor, residual: Tensor, boundary: str, kernel_size: Sequence[int]
) -> Tensor: ...
def blur_downsample2d(image: Tensor, kernel: Tensor, boundary: str, factor: int) -> Tensor: ...
def blur_downsample2d_adjoint(
    residual: Tensor, kernel: Tensor, boundary: str, factor: int, image_size: Sequence[int]
) -> Tensor: ...
def blur_data_term(
    image: Tensor, kernel: Tensor, observation: Tensor, mask: Tensor | None, boundary: str
) -> Tensor: ...
def blur_gradients(
    image: Tensor, kernel: Tensor, observation: Tensor, mask: Tensor | None, boundary: str
) -> tuple[Tensor, Tensor, Tensor]: ...
def kernel_map_statistics(
    image: Tensor,
    observation: Tensor,
    window: Tensor | None,
    kernel_size: Sequence[int],
    domain: str,
    image_variance: float,
    prepared: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def kernel_map_prepare(
    observation: Tensor, window: Tensor | None, kernel_size: Sequence[int], domain: str
) -> Tensor: ...
def kernel_map_solve(
    autocorrelation: Tensor,
    crosscorrelation: Tensor,
    target: Tensor,
    start: Tensor,
    alpha: float,
    steps: int,
) -> Tensor: ...
def kernel_map_update(
    image: Tensor,
    observation: Tensor,
    kernel: Tensor,
    window: Tensor | None,
    noise_std: float,
    penalty: float,
    regularization: float,
    iterations: int,
    prior: str,
    domain: str,
    support_exact: bool,
    image_variance: float,
    solver_steps: int,
    prepared: Tensor | None,
) -> Tensor: ...
def project_simplex(kernel: Tensor) -> Tensor: ...
def recenter_kernel(kernel: Tensor, subpixel: bool) -> Tensor: ...
def wiener_deconv2d(
    image_hat: Tensor,
    observation: Tensor,
    kernel: Tensor,
    ratio: Tensor,
    mask: Tensor | None,
    passes: int,
) -> Tensor: ...
def wiener_deconv2d_backward(
    grad: Tensor,
    image_hat: Tensor,
    observation: Tensor,
    kernel: Tensor,
    ratio: Tensor,
    mask: Tensor | None,
    passes: int,
    need_observation: bool,
    need_kernel: bool,
    need_ratio: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def richardson_lucy(
    observation: Tensor,
    kernel: Tensor,
    initial: Tensor,
    mask: Tensor | None,
    boundary: str,
    iterations: int,
    total_variation: float,
    eps: float,
) -> Tensor: ...
def varying_blur2d(image: Tensor, kernels: Tensor, weights: Tensor, boundary: str) -> Tensor: ...
def varying_blur2d_adjoint(
    residual: Tensor, kernels: Tensor, weights: Tensor, boundary: str
) -> Tensor: ...
def varying_blur2d_kernels(
    image: Tensor, residual: Tensor, weights: Tensor, boundary: str, kernels_size: Sequence[int]
) -> Tensor: ...
def varying_blur_gradients(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    observation: Tensor,
    mask: Tensor | None,
    boundary: str,
) -> tuple[Tensor, Tensor, Tensor]: ...
def volume_render(
    density: Tensor,
    color: Tensor,
    camera_to_world: Tensor,
    intrinsics: Tensor,
    image_size: Sequence[int],
    near: float,
    far: float,
    samples_per_ray: int,
    early_stop_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def volume_render_backward(
    grad_color: Tensor,
    grad_opacity: Tensor,
    grad_depth: Tensor,
    density: Tensor,
    color: Tensor,
    camera_to_world: Tensor,
    intrinsics: Tensor,
    near: float,
    far: float,
    samples_per_ray: int,
    early_stop_eps: float | None,
    need_density: bool,
    need_color: bool,
    need_cameras: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
