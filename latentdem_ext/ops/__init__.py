"""The public operators: thin wrappers with documentation, fake kernels and autograd."""

from latentdem_ext.ops._transforms import full_precision_under_autocast
from latentdem_ext.ops._vmap import (
    each,
    join_batch,
    join_batch_of_kernel_adjoint,
    join_leading,
    join_views,
    ratio,
    shared,
    whole,
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
join_batch("blur_conv2d", image=whole, kernel=shared)
join_batch("blur_conv2d_adjoint", residual=whole, kernel=shared)
join_batch_of_kernel_adjoint("blur_conv2d_kernel")
join_batch("blur_downsample2d", image=whole, kernel=shared)
join_batch("blur_downsample2d_adjoint", residual=whole, kernel=shared)
join_batch("blur_data_term", image=whole, kernel=shared, observation=whole, mask=shared)
join_batch(
    "blur_gradients", {2: "kernel"}, image=whole, kernel=each, observation=whole, mask=shared
)
join_batch("varying_blur2d", image=whole, kernels=shared)
join_batch("varying_blur2d_adjoint", residual=whole, kernels=shared)
join_batch_of_kernel_adjoint("varying_blur2d_kernels")
join_batch(
    "varying_blur_gradients",
    {2: "kernels"},
    image=whole,
    kernels=each,
    observation=whole,
    mask=shared,
)
join_batch("kernel_map_prepare", observation=whole, window=shared)
join_batch("kernel_map_statistics", image=whole, observation=whole, window=shared, prepared=whole)
join_batch(
    "kernel_map_solve", crosscorrelation=whole, autocorrelation=whole, target=whole, start=whole
)
join_batch(
    "kernel_map_update",
    image=whole,
    observation=whole,
    kernel=whole,
    window=shared,
    prepared=whole,
)
join_leading("project_simplex")
join_leading("recenter_kernel")
join_batch(
    "wiener_deconv2d",
    image_hat=whole,
    observation=shared,
    kernel=shared,
    ratio=ratio,
    mask=shared,
)
join_batch(
    "wiener_deconv2d_backward",
    {2: "kernel"},
    grad=whole,
    image_hat=whole,
    observation=shared,
    kernel=each,
    ratio=ratio,
    mask=shared,
)
join_batch("richardson_lucy", observation=whole, kernel=shared, initial=whole, mask=shared)
join_views()

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
