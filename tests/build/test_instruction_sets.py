"""A build for a newer processor shares no symbol that the linker could pick for an older one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/ldem_kernels_avx*.dir/**/*.o"))


@pytest.mark.skipif(not OBJECTS, reason="no objects of this build (installed from a wheel)")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: f"{p.parts[-4]}-{p.name}")
def test_weak_symbols_belong_to_their_instruction_set(path):
    isa = re.search(r"ldem_kernels_(avx\w+)\.dir", str(path))[1]
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    weak = [line for line in listing.splitlines() if re.match(r"\S+ [WVu] ", line)]
    assert weak
    # DW.ref: a pointer to the language's own exception handler.
    foreign = [line for line in weak if f"isa_{isa}::" not in line and " DW.ref." not in line]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_answer(isa):
    """Run in a process of its own, because the choice is made once."""
    program = """
import torch, latentdem_ext as ext
from latentdem_ext import reference
torch.manual_seed(0)
x, y = torch.rand(2, 2, 3, 30, 28).double()
k = torch.rand(2, 1, 9, 10).double()
for a, b in zip(ext.blur_gradients(x, k, y), reference.blur_gradients(x, k, y)):
    torch.testing.assert_close(a, b)
lags, cross = ext.kernel_map_statistics(x, y, (7, 6))
torch.testing.assert_close((lags, cross), reference.kernel_map_statistics(x, y, (7, 6)))
pose = ext.pose_from_spherical(torch.tensor([20.0]), torch.tensor([30.0]), 2.5)
lens = ext.intrinsics_from_fov(torch.tensor([50.0]), (9, 10))
options = dict(image_size=(9, 10), near=1.0, far=4.0, samples_per_ray=40)
scene = [torch.rand(1, 9, 8, 7), torch.rand(3, 9, 8, 7), pose, lens]
for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
    results = []
    # Cameras in float64, so that both see the same samples in the same cells.
    for render, grid in ((ext.volume_render, dtype), (reference.volume_render, torch.float64)):
        inputs = [t.to(grid if i < 2 else torch.float64).requires_grad_()
                  for i, t in enumerate(scene)]
        outputs = render(*inputs, **options)
        loss = sum((o * o).sum() for o in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * float(b.abs().max()))
print(ext.build_info()["cpu_capability"])
"""
    environment = os.environ | {
        "LATENTDEM_CPU_CAPABILITY": isa,
        "PYTHONPATH": str(ROOT),
    }
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    # A processor without it takes the best that it has, but never more than was asked for.
    sets = ["default", "avx2", "avx512"]
    assert found.stdout.strip() in sets[: sets.index(isa) + 1]
