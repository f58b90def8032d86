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
    blur_gradients,
    kernel_map_solve,
    kernel_map_statistics,
    kernel_map_update,
    project_simplex,
    recenter_kernel,
    volume_render,
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


def build_info() -> dict[str, Any]:
    """What the native module was built with: version, torch, compiler, flags, OpenMP, CUDA."""
    return dict(_C.build_info())


__all__ = [
    "blur_conv2d",
    "blur_conv2d_adjoint",
    "blur_data_term",
    "blur_gradients",
    "build_info",
    "convert_pose",
    "intrinsics_from_fov",
    "invert_pose",
    "kernel_map_solve",
    "kernel_map_statistics",
    "kernel_map_update",
    "pose_from_spherical",
    "project_simplex",
    "recenter_kernel",
    "relative_spherical",
    "se3_exp",
    "se3_log",
    "spherical_from_pose",
    "volume_render",
    "zero123_condition",
]
