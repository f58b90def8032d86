"""The same operators in plain torch: the specification, and the oracle of the tests.

No tricks and no speed; float64-capable; differentiable by autograd.
"""

from latentdem_ext.reference.blur import (
    blur_conv2d,
    blur_conv2d_adjoint,
    blur_data_term,
    blur_gradients,
)
from latentdem_ext.reference.deconv import richardson_lucy, wiener_deconv2d
from latentdem_ext.reference.downsample import blur_downsample2d, blur_downsample2d_adjoint
from latentdem_ext.reference.kernel_map import (
    kernel_map_prepare,
    kernel_map_solve,
    kernel_map_statistics,
    kernel_map_update,
    project_simplex,
    recenter_kernel,
)
from latentdem_ext.reference.varying_blur import (
    varying_blur2d,
    varying_blur2d_adjoint,
    varying_blur_gradients,
)
from latentdem_ext.reference.volume_render import volume_render

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
