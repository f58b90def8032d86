"""Planning a call: its launches, in sizes that no emulation finishes, and no trace left behind."""

import torch
from ops.test_volume_render import PLAIN

from latentdem_ext import reference


def test_a_plan_names_kernels_and_their_configurations(emulator):
    emulator.seed(0)
    grid = [torch.empty(channels, 64, 64, 64) for channels in (1, 3)]
    cameras = torch.empty(1, 4, 4), torch.empty(1, 4)
    launches = emulator.plan(
        lambda: emulator.operators.volume_render(*grid, *cameras, [512, 500], 1.0, 5.0, 256, None)
    )
    names = ["pack_grid<float>", "find_occupied<float>", "render_forward<float>"]
    assert len(launches) == len(names)
    for launch, name in zip(launches, names, strict=True):
        assert name in launch.kernel
    march = launches[-1]  # tiles of 16 x 8 pixels
    assert (march.blocks, march.threads, march.shared_bytes) == (64 * 32, 128, 0)

    inputs = PLAIN.tensors(torch.float64)
    settings = PLAIN.near, PLAIN.far, PLAIN.samples
    found = emulator.operators.volume_render(*inputs, list(PLAIN.image), *settings, None)
    for a, b in zip(found, reference.volume_render(*inputs, **PLAIN.options), strict=True):
        torch.testing.assert_close(a, b)
