"""What every training loop here shares: a time budget, EMA, checkpoints, a progress line.

On a GPU the networks run in bfloat16 under autocast, normalisations too (:func:`lighten_norms`),
with float32 weights, averages and moments.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdem.devices import find_device

LossFunction = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    The learning rate warms up over ``warmup_steps``, then follows half a cosine of the
    *time* spent, so that a run of any length ends annealed.  ``device`` is where it happens.
    """

    minutes: float
    learning_rate: float
    warmup_steps: int = 200
    ema_decay: float = 0.999
    report_every: int = 100
    checkpoint_seconds: float = 120.0
    weight_decay: float = 0.01
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def choose_device(name: str | None = None) -> torch.device:
    """``auto`` or ``None`` is a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: no such device here, or one that training was not made for.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return find_device(str(name), "training runs")


def _norm_in_input_type(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight = None if norm.weight is None else norm.weight.to(x.dtype)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def lighten_norms(model: nn.Module) -> None:
    """Let ``model``'s group and layer norms give what they get, under autocast too.

    Autocast makes them float32, and with them the activations behind them: twice the bytes where
    bytes are what takes the time.  Their sums are float32 inside the kernels in any case.
    """
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.forward = partial(_norm_in_input_type, module)  # type: ignore[method-assign]


def round_to_half(model: nn.Module) -> nn.Module:
    """The weights as they are shipped: everything after is measured on these."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    return rounded.eval()


def _learning_rate(plan: TrainingPlan, step: int, progress: float) -> float:
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return plan.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    dense = torch.contiguous_format  # safetensors takes no other
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value).clone(memory_format=dense)
        for index, entry in state.items()
        for key, value in entry.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)


def train(
    name: str,
    model: nn.Module,
    loss_function: LossFunction,
    plan: TrainingPlan,
    checkpoint: Path,
    *,
    resume: bool,
    validate: Callable[[nn.Module], str] | None = None,
    console: Console | None = None,
) -> nn.Module:
    """Train ``model`` for ``plan.minutes`` and return its exponential moving average.

    ``checkpoint`` (safetensors: weights, EMA, optimiser moments, step and seconds spent) is
    written every two minutes and at the end; with ``resume`` the run goes on from it, and
    a finished run returns at once.  ``loss_function(model, step)`` gives a scalar.  Model and
    average live on ``plan.device``; ``validate`` gets the average there.
    """
    console = console or Console()
    model = model.to(plan.device)
    on_gpu = plan.device.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if on_gpu:
        lighten_norms(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.learning_rate,
        weight_decay=plan.weight_decay,
        betas=(0.9, 0.99),
        fused=on_gpu,
    )
    step, spent = 0, 0.0
    if resume and checkpoint.exists():
        tensors = load_file(checkpoint, device=str(plan.device))
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
        _restore_optimizer(optimizer, tensors)
        step, spent = int(tensors["step"]), float(tensors["seconds"])
        console.print(f"{name}: resumed at step {step} after {spent / 60:.1f} min")

    def save() -> None:
        tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
        tensors |= {f"ema.{k}": v.contiguous() for k, v in ema.state_dict().items()}
        tensors |= _flatten_optimizer(optimizer)
        tensors |= {"step": torch.tensor(step), "seconds": torch.tensor(spent)}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(checkpoint)

    model.train()
    budget, saved_at = plan.minutes * 60, spent
    losses: list[Tensor] = []  # read only when they are shown: reading waits for the GPU
    parameters: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(ema.parameters())
    last = time.monotonic()
    while spent < budget:
        rate = _learning_rate(plan, step, spent / budget)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = loss_function(model, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(plan.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        step += 1
        now = time.monotonic()
        # A suspended process (SIGSTOP, a closed laptop) must not eat the budget.
        spent += min(now - last, 10.0)
        last = now
        losses.append(loss.detach())
        if step % plan.report_every == 0:
            left = (budget - spent) / 60
            running = float(torch.stack(losses).mean())
            losses.clear()
            console.print(
                f"{name}: step {step}  loss {running:.5f}  lr {rate:.1e}  "
                f"{spent / 60:.1f} of {plan.minutes:.0f} min, {left:.1f} left",
                highlight=False,
            )
        if spent - saved_at > plan.checkpoint_seconds:
            save()
            saved_at = spent
            if validate is not None:
                console.print(f"{name}: {validate(ema)}", highlight=False)
                last = time.monotonic()
    save()
    if validate is not None:
        console.print(f"{name}: done at step {step}: {validate(ema)}", highlight=False)
    return ema
