"""Every operator has a CUDA path that agrees with the CPU, also in the layout of its results."""

import pytest
import torch
from registration.test_dispatcher import OPERATORS, arguments

# What kernel_map_prepare returns is each device's own.
COMPARABLE = [name for name in OPERATORS if name != "kernel_map_prepare"]


def call(operators, name, values):
    found = getattr(operators, name)(*values)
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


@pytest.mark.parametrize("name", COMPARABLE)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_as_on_the_cpu(emulated, name, layout):
    values = [
        v.contiguous(memory_format=layout) if isinstance(v, torch.Tensor) and v.dim() == 4 else v
        for v in arguments(name)
    ]
    expected = call(torch.ops.latentdem, name, values)
    for left, right in zip(expected, call(emulated, name, values), strict=True):
        assert left.dtype == right.dtype and left.stride() == right.stride()
        scale = float(left.abs().max()) if left.numel() else 0.0
        torch.testing.assert_close(right, left, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", OPERATORS)
def test_runs_where_torch_looks_for_it(emulator, name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"latentdem_emulated::{name}", "CPU")
