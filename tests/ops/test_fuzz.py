"""Bounded fuzzing: whatever comes in, out comes a clear Python error or a right answer.

``LATENTDEM_FUZZ`` sets the number of cases an operator (``make fuzz`` takes many; ``make
sanitize`` runs these under AddressSanitizer).
"""

import math
import os
import random

import pytest
import torch

import latentdem_ext as ext
from latentdem_ext import reference

CASES = int(os.environ.get("LATENTDEM_FUZZ", "150"))
BOUNDARIES = ("circular", "reflect", "replicate", "zero", "valid")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def arguments(name, rng):
    """Random valid arguments of one operator, by keyword."""

    def tensor(*shape, dtype=torch.float64):
        return torch.rand(shape, dtype=dtype)

    batch, channels = rng.choice([0, 1, 1, 2, 3]), rng.randint(1, 3)
    height, width = rng.choice([1, 2, 7, 16, 23]), rng.choice([1, 3, 8, 20])
    kh, kw = rng.randint(1, height), rng.randint(1, width)
    image = tensor(batch, channels, height, width)
    kernel = tensor(rng.choice([1, batch]), rng.choice([1, channels]), kh, kw) + 0.01
    boundary = rng.choice(BOUNDARIES)
    grow = (kh - 1, kw - 1) if boundary == "valid" else (0, 0)
    blurred = tensor(batch, channels, height - grow[0], width - grow[1])
    mask = rng.choice([None, tensor(rng.choice([1, batch]), 1, *blurred.shape[2:])])
    window = rng.choice([None, tensor(rng.choice([1, batch]), 1, height, width)])
    data = {"image": image, "kernel": kernel, "boundary": boundary}
    if name == "blur_conv2d":
        return data
    if name == "blur_conv2d_adjoint":
        return {
            "residual": blurred,
            "kernel": kernel,
            "boundary": boundary,
            "image_size": (height, width),
        }
    if name in ("blur_data_term", "blur_gradients"):
        return data | {"observation": blurred, "mask": mask}
    if name.startswith(("wiener", "richardson", "blur_downsample", "varying")):
        return inverse_arguments(name, rng, data | {"blurred": blurred, "mask": mask})
    if name == "volume_render":
        return camera_arguments(rng)
    if name in ("project_simplex", "recenter_kernel"):
        lead = rng.choice([(), (2,), (2, 1), (0,)])
        planes = {"kernel": tensor(*lead, kh, kw) + 0.01}
        return planes | ({"subpixel": rng.random() < 0.5} if name == "recenter_kernel" else {})
    domain = {"domain": rng.choice(["image", "gradient"]), "window": window}
    if name == "kernel_map_statistics":
        sizes = {"kernel_size": (kh, kw), "image_variance": rng.choice([0.0, 0.1])}
        return {"image": image, "observation": tensor(*image.shape)} | sizes | domain
    if name == "kernel_map_prepare":
        return {"observation": image, "kernel_size": (kh, kw)} | domain
    if name == "kernel_map_solve":
        lags = torch.zeros(batch, 2 * kh - 1, 2 * kw - 1, dtype=torch.float64)
        lags[:, kh - 1, kw - 1] = 1 + rng.random()  # a multiple of the identity: solved in one step
        return {
            "autocorrelation": lags,
            "crosscorrelation": tensor(batch, kh, kw),
            "target": tensor(batch, kh, kw),
            "start": tensor(batch, kh, kw),
            "alpha": rng.random(),
            "steps": rng.randint(1, 3),
        }
    return domain | {
        "image": image,
        "observation": tensor(*image.shape),
        "kernel": tensor(batch, 1, kh, kw),
        "noise_std": 0.1 + rng.random(),
        "penalty": 1e3,
        "regularization": rng.random(),
        "iterations": rng.randint(1, 2),
        "prior": rng.choice(["none", "l1", "l2"]),
        "support_exact": False,  # the exact one is checked at convergence elsewhere
        "image_variance": rng.choice([0.0, 0.1]),
    }


def inverse_arguments(name, rng, data):
    """Arguments of the deconvolutions and of the blurs beyond the uniform one."""
    image, kernel, boundary = data["image"], data["kernel"], data["boundary"]
    blurred, mask = data["blurred"], data["mask"]
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    if name == "wiener_deconv2d":
        mask = None if mask is None else (torch.rand(1, 1, *image.shape[2:]) > 0.3).double()
        return {
            "image_hat": image,
            "observation": torch.rand_like(image),
            "kernel": kernel,
            "ratio": 0.01 + rng.random(),
            "mask": mask,
            "passes": rng.randint(1, 3),
        }
    if name == "richardson_lucy":
        return {
            "observation": blurred + 0.1,
            "kernel": kernel,
            "iterations": rng.randint(1, 3),
            "boundary": boundary,
        }
    factor = rng.randint(1, 3)
    if name == "blur_downsample2d":
        return {"image": image, "kernel": kernel, "factor": factor, "boundary": boundary}
    if name == "blur_downsample2d_adjoint":
        return {
            "residual": blurred[..., ::factor, ::factor],
            "kernel": kernel,
            "factor": factor,
            "boundary": boundary,
            "image_size": tuple(image.shape[2:]),
        }
    patches = rng.randint(1, 3)
    weights = (torch.rand(patches, *image.shape[2:]).double() - 0.3).clamp_min(0)
    kernels = kernel[:, :1].expand(-1, patches, -1, -1).contiguous()
    shared = {"kernels": kernels, "weights": weights, "boundary": boundary}
    if name == "varying_blur2d":
        return shared | {"image": image}
    if name == "varying_blur2d_adjoint":
        return shared | {"residual": blurred}
    return shared | {"image": image, "observation": blurred, "mask": mask}


def camera_arguments(rng):
    """Arguments of the renderer, cameras that look past the grid included."""
    views, depth, height, width = rng.choice([0, 1, 2]), *(rng.randint(1, 6) for _ in range(3))
    poses = ext.pose_from_spherical(
        torch.rand(views).double() * 60, torch.rand(views).double() * 360, 2.5
    )
    if rng.random() < 0.3:
        poses = torch.randn_like(poses)
    return {
        "density": 3 * torch.rand(1, depth, height, width).double(),
        "color": torch.rand(3, depth, height, width).double(),
        "camera_to_world": poses,
        "intrinsics": 1 + 9 * torch.rand(views, 4).double(),
        "image_size": (rng.randint(1, 5), rng.randint(1, 5)),
        "near": rng.random(),
        "far": 3 + rng.random(),
        "samples_per_ray": rng.choice([1, 7, 150]),
        "early_stop_eps": 0.0,
    }


def relayout(value, rng):
    """The same values under other strides."""
    choice = rng.randrange(4)
    if choice == 0 and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if choice == 1:
        padded = value.new_full([s + 2 for s in value.shape], math.nan)
        inside = padded[tuple(slice(1, 1 + s) for s in value.shape)]
        return inside.copy_(value)
    if choice == 2 and value.dim() >= 2:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    return value


def damage(value, rng):
    """Something that a caller might pass by mistake."""
    if isinstance(value, torch.Tensor):
        kind = rng.randrange(9)
        if kind == 0:
            return value[None]
        if kind == 1:
            return value.sum(-1)
        if kind == 2 and value.dim():
            size = list(value.shape)
            size[rng.randrange(len(size))] = rng.choice([0, 1, 2, 5, 31])
            return torch.rand(size, dtype=value.dtype)
        if kind == 3:
            return value.to(rng.choice([torch.int32, torch.bool, torch.complex64, torch.uint8]))
        if kind == 4 and value.numel():
            value = value.clone()
            value.view(-1)[rng.randrange(value.numel())] = rng.choice(
                [math.nan, math.inf, -math.inf]
            )
            return value
        if kind == 5:
            return torch.zeros_like(value)
        if kind == 6:
            return value[..., :1].expand(value.shape)
        if kind == 7:
            return value.to(rng.choice(DTYPES))
        return value.flip(-1) * rng.choice([-1, 1e30, 1e-30])
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return rng.choice(["", "mirror", "CIRCULAR", "\u00e9\x00"])
    if isinstance(value, tuple):
        return tuple(rng.choice([v, 0, -1, 1, v + 1, 2**40]) for v in value)
    if isinstance(value, int):
        return rng.choice([0, -1, -(2**40), 1])
    return rng.choice([0.0, -1.0, math.nan, math.inf, 1e-300])


def check(found, expected, skips_zeros):
    """Equal wherever the answer is finite, and not finite where the reference is not.

    Operators that skip zeros (of a weight, of what downsampling drops) may stay finite where the
    reference multiplies them with a NaN.

    A transform spreads one NaN over the plane, which is an honest answer; a finite wrong
    number is not.
    """
    for left, right in zip(found, expected, strict=True):
        assert left.shape == right.shape
        half = left.dtype in (torch.float16, torch.bfloat16)
        left, right = left.double(), right.double()
        finite = left.isfinite()
        assert skips_zeros or not finite[~right.isfinite()].any()
        finite &= right.isfinite()
        scale = float(right[finite].abs().max()) if finite.any() else 0.0
        tolerance = (3e-2 if half else 2e-4) * scale + 1e-12
        assert ((left - right)[finite].abs() <= tolerance).all()


@pytest.mark.parametrize("name", ext.ops.__all__)
def test_fuzz(name):
    rng = random.Random(f"{name} {os.environ.get('LATENTDEM_FUZZ_SEED', '0')}")
    answered = refused = 0
    for case in range(CASES):
        torch.manual_seed(case)
        given = arguments(name, rng)
        broken = rng.random() < 0.7
        if broken:
            key = rng.choice(sorted(given))
            given[key] = damage(given[key], rng)
        given = {
            k: relayout(v, rng) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        try:
            found = getattr(ext, name)(**given)
        except (ValueError, TypeError) as error:
            assert broken, f"refused valid arguments: {error}"
            message = str(error)
            # It names an argument, or its part.
            assert any(k in message for k in (*given, "kernel_size", "target")), message
            refused += 1
            continue
        except RuntimeError as error:
            assert "allocate memory" in str(error), error  # torch's own, of an absurd size
            continue
        answered += 1
        found = found if isinstance(found, tuple) else (found,)
        if name == "kernel_map_prepare":
            continue  # opaque
        if any(isinstance(v, torch.Tensor) and v.numel() == 0 for v in given.values()):
            assert all(not result.any() for result in found)
            continue
        if given.get("steps") == 0 or any(
            isinstance(v, float) and v in (0.0, 1e-300) for k, v in given.items() if k == "alpha"
        ):
            continue  # the start itself; a singular system: any answer that is no crash
        if broken and key == "autocorrelation":
            # No autocorrelation any more, so that its matrix need not be positive.
            assert given[key].isfinite().all() or not found[0].isfinite().all()
            continue
        if broken and given.get("subpixel") is False:
            continue  # constant planes: a tie between two pixels
        exact = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        expected = getattr(reference, name)(**exact)
        expected = expected if isinstance(expected, tuple) else (expected,)
        try:
            check(found, expected, name.startswith(("varying", "blur_downsample")))
        except AssertionError as error:
            raise AssertionError(
                f"case {case}: damaged {key if broken else 'nothing'}: {given}"
            ) from error
    assert answered and refused
