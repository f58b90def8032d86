"""Derivatives of the kernel estimate, against finite differences and the plain torch reference."""

import pytest
import torch

import latentdem_ext as ext
from latentdem_ext import reference

DOMAINS = ("image", "gradient")
PRIORS = ("none", "l1", "l2", "callable")


def problem(batch=2, channels=2, size=(8, 9), kernel_size=(3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    image, kernel, window = (
        rand(batch, channels, *size),
        rand(batch, 1, *kernel_size) + 0.1,
        rand(1, 1, *size),
    )
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    observation = reference.blur_conv2d(image, kernel) + 0.05 * rand(*image.shape)
    return image, observation, kernel, window


def tracked(*tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def squared(kernel, strength):
    """A denoiser with a derivative."""
    kernel = kernel**1.5 + 0.01 * strength
    return kernel / kernel.sum((-2, -1), keepdim=True)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("windowed", [False, True])
# The last is as large as the image, so that without a window its lags meet at the other side.
@pytest.mark.parametrize("kernel_size", [(3, 4), (1, 1), (6, 5)])
def test_statistics(domain, windowed, kernel_size):
    image, observation, _, window = problem(size=(6, 5), kernel_size=(3, 3))
    inputs = tracked(image, observation, *([window] if windowed else []))

    def statistics(image, observation, window=None, of=ext):
        return of.kernel_map_statistics(
            image, observation, kernel_size, domain=domain, window=window, image_variance=0.1
        )

    assert torch.autograd.gradcheck(statistics, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(statistics, inputs, fast_mode=True)
    found, plain = (
        torch.autograd.grad(sum((t**2).sum() for t in statistics(*inputs, of=of)), inputs)
        for of in (ext, reference)
    )
    torch.testing.assert_close(found, plain)


def test_a_window_of_each_image():
    image, observation, _, window = problem()
    window = torch.cat([window, window.flip(-1)])
    inputs = tracked(image, observation, window)

    def statistics(image, observation, window):
        return ext.kernel_map_statistics(
            image, observation, (3, 4), window=window, image_variance=0.1
        )

    assert torch.autograd.gradcheck(statistics, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", range(3))
def test_one_of_the_statistics_inputs_alone(wanted):
    image, observation, _, window = problem()
    inputs = [t.clone() for t in (image, observation, window)]
    every = tracked(*inputs)
    inputs[wanted].requires_grad_()

    def loss(image, observation, window):
        lags, cross = ext.kernel_map_statistics(image, observation, (3, 4), window=window)
        return lags.square().sum() + cross.square().sum()

    (found,) = torch.autograd.grad(loss(*inputs), inputs[wanted])
    torch.testing.assert_close(found, torch.autograd.grad(loss(*every), every)[wanted])


def test_solution():
    image, observation, kernel, _ = problem()
    lags, cross = ext.kernel_map_statistics(image, observation, (3, 4))
    inputs = tracked(lags / 2, cross, kernel[:, 0])
    zero = torch.zeros_like(cross)

    def solve(half, cross, target, of=ext):
        # Of equal pairs, as lags are.
        lags = half + half.flip((-2, -1))
        return of.kernel_map_solve(lags, cross, target, zero, alpha=1.0, steps=60)

    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)
    found, plain = (
        torch.autograd.grad((solve(*inputs, of=of) ** 3).sum(), inputs) for of in (ext, reference)
    )
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-8)


def test_the_start_has_no_say():
    image, observation, kernel, _ = problem()
    lags, cross = ext.kernel_map_statistics(image, observation, (3, 4))
    (start,) = tracked(kernel[:, 0])
    found = ext.kernel_map_solve(lags, cross, cross, start, alpha=1.0, steps=60)
    assert torch.autograd.grad(found.sum(), start, allow_unused=True) == (None,)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("support_exact", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("windowed", [False, True])
def test_update_matches_the_reference(domain, support_exact, prior, windowed):
    image, observation, kernel, window = problem()
    inputs = tracked(image, observation, kernel, *([window] if windowed else []))
    weight = torch.rand(kernel.shape, dtype=torch.float64)

    def loss(image, observation, kernel, window=None, of=ext):
        found = of.kernel_map_update(
            image, observation, kernel, noise_std=0.02, penalty=1e4, regularization=100.0,
            iterations=3, prior=squared if prior == "callable" else prior, domain=domain,
            support_exact=support_exact, window=window, image_variance=1e-3, solver_steps=60,
        )  # fmt: skip
        return (found * weight).sum()

    found, plain = (torch.autograd.grad(loss(*inputs, of=of), inputs) for of in (ext, reference))
    assert all(grad.abs().max() > 1e-6 for grad in plain)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("support_exact", [True, False])
def test_update_twice(support_exact):
    image, observation, kernel, _ = problem(batch=1, channels=1, size=(6, 5), kernel_size=(3, 3))
    inputs = tracked(image, observation, kernel)

    def update(image, observation, kernel):
        return ext.kernel_map_update(
            image, observation, kernel, noise_std=0.1, penalty=1e2, regularization=1.0,
            iterations=2, prior="l2", support_exact=support_exact, solver_steps=40,
        )  # fmt: skip

    assert torch.autograd.gradcheck(update, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(update, inputs, fast_mode=True)


@pytest.mark.parametrize("of", [ext, reference])
def test_where_nothing_is_left_the_gradient_is_a_number(of):
    image, _, kernel, _ = problem()
    inputs = tracked(image, kernel)
    found = of.kernel_map_update(
        inputs[0], -image, inputs[1], noise_std=0.01, penalty=1e-6, regularization=0.0,
        iterations=1, prior="none",
    )  # fmt: skip
    grads = torch.autograd.grad((found * torch.rand_like(found)).sum(), inputs)
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("support_exact", [True, False])
@pytest.mark.parametrize("windowed", [True, False])
def test_no_images_have_no_gradients(support_exact, windowed):
    *images, window = problem()
    image, observation, kernel = (t[:0] for t in images)
    inputs = tracked(image, observation, kernel, *([window] if windowed else []))
    found = ext.kernel_map_update(
        *inputs[:3], noise_std=0.1, penalty=1e2, regularization=1.0, iterations=2,
        support_exact=support_exact, window=inputs[3] if windowed else None,
    )  # fmt: skip
    lags, cross = ext.kernel_map_statistics(*inputs[:2], (3, 4))
    solution = ext.kernel_map_solve(lags, cross, cross, cross, alpha=1.0, steps=2)
    grads = torch.autograd.grad(found.sum() + solution.sum(), inputs)
    for grad, tensor in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_a_prepared_observation_has_the_same_derivatives():
    inputs = tracked(*problem(size=(12, 10))[:2])
    prepared = ext.kernel_map_prepare(inputs[1], (3, 4))
    assert prepared.numel() > 0 and not prepared.requires_grad
    found, plain = (
        torch.autograd.grad(
            ext.kernel_map_statistics(*inputs, (3, 4), prepared=each)[1].square().sum(), inputs
        )
        for each in (prepared, None)
    )
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_tensors(dtype):
    image, observation, kernel, window = (t.to(dtype) for t in problem())
    inputs = tracked(image, observation, kernel, window)

    def loss(image, observation, kernel, window, of=ext):
        found = of.kernel_map_update(
            image, observation, kernel, noise_std=0.1, penalty=1e2, regularization=0.0,
            iterations=2, prior="none", window=window, solver_steps=40,
        )  # fmt: skip
        return found.double().square().sum()

    found = torch.autograd.grad(loss(*inputs), inputs)
    assert {grad.dtype for grad in found} == {dtype}
    exact = tracked(*(t.double() for t in inputs))
    plain = torch.autograd.grad(loss(*exact, of=reference), exact)
    for left, right in zip(found, plain, strict=True):
        scale = right.abs().max()
        torch.testing.assert_close(left.double() / scale, right / scale, rtol=0, atol=2e-2)


@pytest.mark.parametrize("domain", DOMAINS)
def test_opcheck_with_gradients(domain):
    image, observation, kernel, window = tracked(*(t.float() for t in problem()))
    ops = torch.ops.latentdem
    torch.library.opcheck(
        ops.kernel_map_statistics, (image, observation, window, [3, 4], domain, 0.1, None)
    )
    lags, cross = (
        t.detach().requires_grad_()
        for t in ext.kernel_map_statistics(image, observation, (3, 4), domain=domain)
    )
    # With as many steps as it takes, so that derivatives agree in whatever order they are made.
    torch.library.opcheck(ops.kernel_map_solve, (lags, cross, cross, cross.detach(), 1.0, 30))
    for exact in (True, False):
        torch.library.opcheck(
            ops.kernel_map_update,
            (image, observation, kernel, window, 0.1, 1e2, 1.0, 2, "l2", domain, exact, 0.0, 30,
             None),
        )  # fmt: skip


def unrolled(image, observation, kernel):
    """Two M-steps with a deconvolution between them: EM with its derivative."""
    settings = {"noise_std": 0.1, "penalty": 1e2, "regularization": 1.0, "iterations": 2}
    for _ in range(2):
        kernel = ext.kernel_map_update(image, observation, kernel, solver_steps=30, **settings)
        image = ext.wiener_deconv2d(image, observation, kernel, 0.1)
    return image.square().sum() + kernel.square().sum()


def test_under_torch_func_and_vmap():
    image, observation, kernel, _ = problem()
    inputs = tracked(image, observation, kernel)
    expected = torch.autograd.grad(unrolled(*inputs), inputs)
    slope = torch.func.grad(unrolled, argnums=(0, 1, 2))
    torch.testing.assert_close(slope(image, observation, kernel), expected)
    # One image after the other, as batch mates do not matter.
    alone = torch.vmap(slope)(image[:, None], observation[:, None], kernel[:, None])
    for left, right in zip(alone, expected, strict=True):
        torch.testing.assert_close(left[:, 0], right, rtol=1e-6, atol=1e-8)


def test_compiled_with_its_backward():
    inputs = tracked(*problem()[:3])
    expected = torch.autograd.grad(unrolled(*inputs), inputs)
    compiled = torch.compile(unrolled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
