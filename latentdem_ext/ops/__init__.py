"""The public operators: thin wrappers with documentation, fake kernels and autograd."""

from latentdem_ext.ops._transforms import (
    full_precision_under_autocast,
    join_batch,
    join_batch_of_kernel_adjoint,
    join_leading,
)
from latentdem_ext.ops.blur import (
    blur_conv2d,
    blur_conv2d_adjoint,
    blur_data_term,
    blur_gradients,
)
from latentdem_ext.ops.deconv import richardson_lucy, wiener_deconv2d
from latentdem_ext.ops.downsample import blur_downsample2d, blur_downsample2d_adjoint
from latentdem_ext.ops.kernel_map import (
    kernel_map_prepare,
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
from latentdem_ext.ops.volume_render import volume_render

full_precision_under_autocast(
    "blur_conv2d",
    "blur_conv2d_adjoint",
    "blur_conv2d_kernel",
    "blur_data_term",
    "blur_downsample2d",
    "blur_downsample2d_adjoint",
    "blur_gradients",
    "kernel_map_prepare",
    "kernel_map_solve",
    "kernel_map_statistics",
    "kernel_map_update",
    "project_simplex",
    "recenter_kernel",
    "richardson_lucy",
    "varying_blur2d",
    "varying_blur2d_adjoint",
    "varying_blur2d_kernels",
    "varying_blur_gradients",
    "volume_render",
    "wiener_deconv2d",
)
join_batch("blur_conv2d", tensors=2)
join_batch("blur_conv2d_adjoint", tensors=2)
join_batch_of_kernel_adjoint()
join_batch("blur_data_term", tensors=4)
join_leading("project_simplex")
join_leading("recenter_kernel")

__all__ = [
    "blur_conv2d",
    "blur_conv2d_adjoint",
    "blur_data_term",
    "blur_downsample2d",
    "blur_downsample2d_adjoint",
    "blur_gradients",
    "kernel_map_prepare",
    "kernel_map_solve",
    "kernel_map_statistics",
    "kernel_map_update",
    "project_simplex",
    "recenter_kernel",
    "richardson_lucy",
    "varying_blur2d",
    "varying_blur2d_adjoint",
    "varying_blur_gradients",
    "volume_render",
    "wiener_deconv2d",
]
