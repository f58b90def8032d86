"""The blur operators as `deepinv <https://deepinv.github.io>`_ physics.

Import on demand; needs deepinv (``pip install 'latentdem[deepinv]'``).  Every class is a
``LinearPhysics`` whose ``A`` and exact ``A_adjoint`` are native, so deepinv's solvers, losses
and unfolded networks run on them.  As in deepinv, parameters given in a call stay.

deepinv's own blur correlates or convolves around another centre for even kernels; here it is
true convolution with the centre at ``(kh // 2, kw // 2)``, as everywhere in latentdem_ext.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from latentdem_ext.ops.blur import blur_conv2d, blur_conv2d_adjoint
from latentdem_ext.ops.deconv import wiener_deconv2d
from latentdem_ext.ops.downsample import blur_downsample2d, blur_downsample2d_adjoint
from latentdem_ext.ops.varying_blur import varying_blur2d, varying_blur2d_adjoint

try:
    from deepinv.physics import LinearPhysics
except ModuleNotFoundError as error:
    if error.name != "deepinv":
        raise
    raise ImportError(
        "latentdem_ext.interop.deepinv needs deepinv: pip install 'latentdem[deepinv]'"
    ) from error

__all__ = ["BlurDownsamplePhysics", "BlurPhysics", "VaryingBlurPhysics"]


class BlurPhysics(LinearPhysics):
    """Uniform blur, ``y = kernel * x``.

    Args:
        kernel: ``[B|1,C|1,kh,kw]``.
        boundary: as for :func:`latentdem_ext.blur_conv2d`.
        options: for ``LinearPhysics``, for instance ``noise_model``.
    """

    def __init__(self, kernel: Tensor, *, boundary: str = "circular", **options: Any) -> None:
        super().__init__(**options)
        self.boundary = boundary
        self.register_buffer("kernel", kernel)

    def A(self, x: Tensor, kernel: Tensor | None = None, **parameters: Any) -> Tensor:
        """Blur ``x [B,C,H,W]``."""
        self.update_parameters(kernel=kernel, **parameters)
        return blur_conv2d(x, self.kernel, boundary=self.boundary)

    def A_adjoint(self, y: Tensor, kernel: Tensor | None = None, **parameters: Any) -> Tensor:
        """Apply the adjoint to ``y [B,C,H',W']``."""
        self.update_parameters(kernel=kernel, **parameters)
        return blur_conv2d_adjoint(y, self.kernel, boundary=self.boundary)

    def prox_l2(
        self, z: Tensor, y: Tensor, gamma: float | Tensor, *arguments: Any, **options: Any
    ) -> Tensor:
        """``argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2``.

        In closed form if the boundary is circular and z an image (solver options are then
        ignored); by deepinv's solver otherwise.
        """
        if self.boundary != "circular" or not isinstance(z, Tensor) or z.shape != y.shape:
            return super().prox_l2(z, y, gamma, *arguments, **options)
        self.update_parameters(kernel=options.get("kernel"))
        ratio = 1 / gamma.to(z).reshape(-1) if isinstance(gamma, Tensor) else 1 / gamma
        if isinstance(ratio, Tensor):
            ratio = ratio.expand(z.shape[0])
        return wiener_deconv2d(z, y, self.kernel, ratio)


class VaryingBlurPhysics(LinearPhysics):
    """Spatially varying blur, ``y = sum_p kernels_p * (weights_p x)``.

    Args:
        kernels: ``[P,kh,kw]`` or ``[B|1,P,kh,kw]``.
        weights: ``[P,H,W]``, see :func:`latentdem_ext.blend_windows`.
        boundary: as for :func:`latentdem_ext.varying_blur2d`.
        options: for ``LinearPhysics``.
    """

    def __init__(
        self, kernels: Tensor, weights: Tensor, *, boundary: str = "circular", **options: Any
    ) -> None:
        super().__init__(**options)
        self.boundary = boundary
        self.register_buffer("kernels", kernels)
        self.register_buffer("weights", weights)

    def A(self, x: Tensor, kernels: Tensor | None = None, **parameters: Any) -> Tensor:
        """Blur ``x [B,C,H,W]``."""
        self.update_parameters(kernels=kernels, **parameters)
        return varying_blur2d(x, self.kernels, self.weights, boundary=self.boundary)

    def A_adjoint(self, y: Tensor, kernels: Tensor | None = None, **parameters: Any) -> Tensor:
        """Apply the adjoint to ``y [B,C,H',W']``."""
        self.update_parameters(kernels=kernels, **parameters)
        return varying_blur2d_adjoint(y, self.kernels, self.weights, boundary=self.boundary)


class BlurDownsamplePhysics(LinearPhysics):
    """Blur, then every ``factor``-th row and column.

    Args:
        kernel: ``[B|1,C|1,kh,kw]``.
        factor: at least 1.
        boundary: as for :func:`latentdem_ext.blur_downsample2d`.
        image_size: ``(H, W)`` if it is not ``factor`` times the measurement's size (plus the
            kernel's size less one for the ``valid`` boundary).
        options: for ``LinearPhysics``.
    """

    def __init__(
        self,
        kernel: Tensor,
        factor: int,
        *,
        boundary: str = "circular",
        image_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.factor = factor
        self.boundary = boundary
        self.image_size = image_size
        self.register_buffer("kernel", kernel)

    def A(self, x: Tensor, kernel: Tensor | None = None, **parameters: Any) -> Tensor:
        """Blur and downsample ``x [B,C,H,W]``."""
        self.update_parameters(kernel=kernel, **parameters)
        return blur_downsample2d(x, self.kernel, self.factor, boundary=self.boundary)

    def A_adjoint(self, y: Tensor, kernel: Tensor | None = None, **parameters: Any) -> Tensor:
        """Apply the adjoint to ``y [B,C,h,w]``."""
        self.update_parameters(kernel=kernel, **parameters)
        return blur_downsample2d_adjoint(
            y, self.kernel, self.factor, boundary=self.boundary, image_size=self.image_size
        )
