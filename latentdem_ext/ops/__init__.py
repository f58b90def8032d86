"""The public operators: thin wrappers with documentation, fake kernels and autograd."""

from latentdem_ext.ops.blur import (
    blur_conv2d,
    blur_conv2d_adjoint,
    blur_data_term,
    blur_gradients,
)
from latentdem_ext.ops.kernel_map import (
    kernel_map_solve,
    kernel_map_statistics,
    kernel_map_update,
    project_simplex,
    recenter_kernel,
)
from latentdem_ext.ops.volume_render import volume_render

__all__ = [
    "blur_conv2d",
    "blur_conv2d_adjoint",
    "blur_data_term",
    "blur_gradients",
    "kernel_map_solve",
    "kernel_map_statistics",
    "kernel_map_update",
    "project_simplex",
    "recenter_kernel",
    "volume_render",
]
