"""Memory that a run takes, and how many photographs go into what is free."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

LARGEST_BATCH = 16
"""Photographs that are restored together at most: beyond it a GPU is busy anyway."""

SHARE = 0.8
"""Of the free memory that a batch may take: sizes and allocators differ a little."""

CUDA_MEMORY, HOST_MEMORY = "cuda allocations", "growth of the process's peak resident set"
"""What :class:`Peak` counts."""


@dataclass
class Peak:
    """Memory of a run, the networks' weights not counted; see :func:`measured`."""

    bytes: int = 0


def memory_kind(device: torch.device) -> str:
    """What :func:`measured` counts on ``device``."""
    return CUDA_MEMORY if device.type == "cuda" else HOST_MEMORY


@contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measure what runs within.

    On a GPU the largest sum of torch's allocations above what was there before.  On a CPU by how
    much the process's largest resident set grew: nothing, if it has been larger before, so that
    only the first photograph of its size tells.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    else:
        before = _resident_peak()
        yield peak
        peak.bytes = _resident_peak() - before


def _resident_peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux


def batch_size_for(bytes_per_image: int, free: int) -> int:
    """Photographs that fit: at least one, at most :data:`LARGEST_BATCH`.

    Args:
        bytes_per_image: as measured; zero: unknown, so one.
        free: bytes.

    >>> batch_size_for(2_000_000_000, 20_000_000_000)
    8
    """
    if bytes_per_image <= 0:
        return 1
    return max(1, min(LARGEST_BATCH, int(SHARE * free / bytes_per_image)))


def graph_size(count: int) -> int:
    """The largest power of two up to ``count``: compiled batches have few sizes, a graph each.

    >>> graph_size(13)
    8
    """
    return 1 << (count.bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that torch could still allocate on a GPU, those that it holds unused included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
