"""The public operators: thin wrappers with documentation, fake kernels and autograd."""

from latentdem_ext.ops.blur import (
    blur_conv2d,
    blur_conv2d_adjoint,
    blur_data_term,
    blur_gradients,
)
from latentdem_ext.ops.deconv import richardson_lucy, wiener_deconv2d
from latentdem_ext.ops.downsample import blur_downsample2d, blur_downsample2d_adjoint
from latentdem_ext.ops.kernel_map import (
    kernel_map_solve,
    kernel_map_statistics,
    kernel_map_update,
    project_simplex,
    recenter_kernel,
)
from latentdem_ext.ops.varying_blur import (
    varying_blur2d,
    varying_blur2d_adjoint,
    varying_blur_gradients,
)

__all__ = [
    "blur_conv2d",
    "blur_conv2d_adjoint",
    "blur_data_term",
    "blur_downsample2d",
    "blur_downsample2d_adjoint",
    "blur_gradients",
    "kernel_map_solve",
    "kernel_map_statistics",
    "kernel_map_update",
    "project_simplex",
    "recenter_kernel",
    "richardson_lucy",
    "varying_blur2d",
    "varying_blur2d_adjoint",
    "varying_blur_gradients",
    "wiener_deconv2d",
]
