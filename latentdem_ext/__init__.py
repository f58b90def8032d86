"""Fused PyTorch operators for blind inverse problems.

Blur convolution with its adjoint and gradients, MAP estimation of blur kernels with the
projections that go with it, and volume rendering down to the camera pose; native C++ behind
``torch.ops.latentdem``.  Camera poses come from plain torch helpers.

>>> import torch, latentdem_ext
>>> image = torch.rand(1, 3, 64, 64)
>>> kernel = torch.full((1, 1, 9, 9), 1 / 81)
>>> latentdem_ext.blur_conv2d(image, kernel, boundary="reflect").shape
torch.Size([1, 3, 64, 64])
"""

from __future__ import annotations

from typing import Any

from latentdem_ext._load import load as _load

_C = _load()

from latentdem_ext.ops import (  # noqa: E402  (the schemas come with _C)
    blur_conv2d,
    blur_conv2d_adjoint,
    blur_data_term,
    blur_downsample2d,
    blur_downsample2d_adjoint,
    blur_gradients,
    kernel_map_prepare,
    kernel_map_solve,
    kernel_map_statistics,
    kernel_map_update,
    project_simplex,
    recenter_kernel,
    richardson_lucy,
    varying_blur2d,
    varying_blur2d_adjoint,
    varying_blur_gradients,
    volume_render,
    wiener_deconv2d,
)
from latentdem_ext.ops.camera import (  # noqa: E402
    convert_pose,
    intrinsics_from_fov,
    invert_pose,
    pose_from_spherical,
    relative_spherical,
    se3_exp,
    se3_log,
    spherical_from_pose,
    zero123_condition,
)
from latentdem_ext.ops.motion_kernel import (  # noqa: E402
    camera_shake_kernel,
    defocus_kernel,
    gaussian_kernel,
    linear_motion_kernel,
)
from latentdem_ext.ops.varying_blur import blend_windows  # noqa: E402


def build_info() -> dict[str, Any]:
    """What the native module was built with: version, torch, compiler, flags, OpenMP, CUDA."""
    return dict(_C.build_info())


__all__ = [
    "blend_windows",
    "blur_conv2d",
    "blur_conv2d_adjoint",
    "blur_data_term",
    "blur_downsample2d",
    "blur_downsample2d_adjoint",
    "blur_gradients",
    "build_info",
    "camera_shake_kernel",
    "convert_pose",
    "defocus_kernel",
    "gaussian_kernel",
    "intrinsics_from_fov",
    "invert_pose",
    "kernel_map_prepare",
    "kernel_map_solve",
    "kernel_map_statistics",
    "kernel_map_update",
    "linear_motion_kernel",
    "pose_from_spherical",
    "project_simplex",
    "recenter_kernel",
    "relative_spherical",
    "richardson_lucy",
    "se3_exp",
    "se3_log",
    "spherical_from_pose",
    "varying_blur2d",
    "varying_blur2d_adjoint",
    "varying_blur_gradients",
    "volume_render",
    "wiener_deconv2d",
    "zero123_condition",
]
