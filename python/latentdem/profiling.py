"""Where the time of a deblurring goes: phases, operators, and a trace for Perfetto."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch.profiler import ProfilerActivity, profile

from latentdem.em.driver import deblur
from latentdem.em.recording import PHASE, pausing
from latentdem.io import ImageLike, atomic_folder

ROWS = 25
"""Operators in the table."""


def profile_deblurring(image: ImageLike, folder: Path, **options: Any) -> dict[str, Any]:
    """Run :func:`latentdem.deblur` under torch's profiler and write what it saw to ``folder``.

    ``trace.json`` opens in ui.perfetto.dev and in TensorBoard; ``operators.txt`` is torch's table,
    ``phases.png`` a picture, ``report.json`` the figures returned: seconds and share of each phase,
    milliseconds, calls, GFLOP/s (of convolutions and matrix products) and GB/s of each operator.
    GB/s counts the tensors that an operator was given, each once (an expanded one as if it were
    whole), over its own time: results and second readings come on top.  One that spends its time in
    others has none.
    The first step, which pays for what is set up once, counts like the others.  Times are a little
    longer than without a profiler.  The search for the first kernel, of too many operators to keep,
    has its time among the phases but is neither in the trace nor among the operators.

    Args:
        image: see :func:`latentdem.deblur`.
        folder: of the files.
        options: of :func:`latentdem.deblur`.

    >>> profile_deblurring("photo.jpg", Path("out/profile"), steps=4)  # doctest: +SKIP
    """
    on_gpu = str(options.get("device") or "cpu").startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(
        activities=activities, with_flops=True, record_shapes=True, acc_events=True
    ) as recorder:
        token = pausing.set(lambda pause: recorder.toggle_collection_dynamic(not pause, activities))
        try:
            result = deblur(image, **options)
        finally:
            pausing.reset(token)
    averages = recorder.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = sorted(
        (event for event in averages if not event.key.startswith(PHASE)),
        key=lambda event: -float(getattr(event, key)),
    )
    given = bytes_given(recorder.events())
    phases = dict(result.report["seconds_by_phase"])
    total = float(result.report["seconds"])
    phases["rest"] = round(max(0.0, total - sum(phases.values())), 3)
    report = {
        "seconds": total,
        "device": result.report["device"],
        "image_size": result.report["image_size"],
        "steps": result.report["settings"]["steps"],
        "phases": {
            name: {"seconds": seconds, "share": seconds / total} for name, seconds in phases.items()
        },
        "operators": [_figures(event, key, given[event.key]) for event in operators[:ROWS]],
    }
    with atomic_folder(folder) as partial:
        recorder.export_chrome_trace(str(partial / "trace.json"))
        table = averages.table(sort_by=key, row_limit=ROWS, max_name_column_width=60)
        (partial / "operators.txt").write_text(table + "\n")
        phases_picture(phases).save(partial / "phases.png")
        (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


_ITEM_BYTES = {
    "c10::complex<double>": 16,
    "c10::complex<float>": 8,
    "double": 8,
    "long int": 8,
    "float": 4,
    "int": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "bool": 1,
    "unsigned char": 1,
}
"""Of the number formats' names in torch's profiler."""


def bytes_given(events: Iterable[Any]) -> Counter[str]:
    """Bytes of the tensors that each operator was given, over all its calls, by its name.

    Args:
        events: of a profiler that records shapes.

    >>> import torch
    >>> with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorder:
    ...     _ = torch.ones(10, 4) + torch.ones(4)
    >>> bytes_given(recorder.events())["aten::add"]
    176
    """
    total: Counter[str] = Counter()
    for event in events:
        for shape, kind in zip(event.input_shapes, getattr(event, "input_dtypes", None) or ()):
            # Single numbers are no traffic; lists of tensors have no shapes here.
            if shape and kind in _ITEM_BYTES:
                total[event.name] += math.prod(shape) * _ITEM_BYTES[kind]
    return total


def _figures(event: Any, key: str, given: int) -> dict[str, Any]:
    own = float(getattr(event, key)) / 1e6
    whole = float(getattr(event, key.removeprefix("self_"))) / 1e6
    flops = float(event.flops or 0)
    return {
        "name": event.key,
        "milliseconds": round(1e3 * own, 3),
        "calls": int(event.count),
        "gflop_per_s": round(flops / own / 1e9, 1) if flops and own else None,
        "gb_per_s": round(given / own / 1e9, 2) if given and own > whole / 2 else None,
    }


def phases_picture(phases: dict[str, float], *, width: int = 640) -> Image.Image:
    """A bar a phase, the longest first, with seconds and share.

    Args:
        phases: seconds by name.
        width: of the picture in pixels.
    """
    total = sum(phases.values()) or 1.0
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    height, left = 24, 150
    picture = Image.new("RGB", (width, height * len(ordered) + 16), "white")
    draw = ImageDraw.Draw(picture)
    longest = max(phases.values(), default=1.0) or 1.0
    for row, (name, seconds) in enumerate(ordered):
        top = 8 + row * height
        end = left + max(1, round((width - left - 130) * seconds / longest))
        draw.text((8, top + 5), name, fill="black")
        draw.rectangle((left, top + 3, end, top + height - 4), fill=(70, 110, 180))
        draw.text((end + 6, top + 5), f"{seconds:.2f} s  {seconds / total:.0%}", fill="black")
    return picture
