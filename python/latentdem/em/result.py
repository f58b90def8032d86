"""The result of :func:`latentdem.deblur`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from latentdem.io import atomic_folder, comparison_picture, kernel_picture, kernel_sheet, to_pil

PER_IMAGE = (
    "kernel_sizes",
    "noise_std",
    "coding_noise_std",
    "tiles",
    "residual_std",
    "warnings",
    "sharp_log_odds",
    "peak_memory_bytes",
)
"""Entries of a report that are lists with one member for each image."""


@dataclass
class DeblurResult:
    """What was recovered, and how.

    Attributes:
        image: restored images ``[B,C,H,W]`` in [0, 1], in the input's size (times ``scale``) and
            channels.
        kernel: blur kernels ``[B,1,k,k]``, non-negative, summing to one, centred; of a varying
            blur ``[B,P,k,k]``, P patches row by row.
        observation: the input ``[B,C,H,W]``.
        history: for each image, a list with a dictionary for each EM step.
        report: settings, seed, seconds by phase, residual, versions; JSON-ready.
            ``peak_memory_bytes`` is what each image took beyond the networks' weights,
            ``peak_memory_kind`` how it was measured (:func:`latentdem.em.memory.measured`);
            ``sharp_log_odds`` says of each image how surely it was sharp already, natural
            logarithm, and is empty where nobody asked.
    """

    image: Tensor
    kernel: Tensor
    observation: Tensor
    history: list[list[dict[str, float]]]
    report: dict[str, Any]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write pictures, kernel and report; a batch gets one numbered subfolder an image.

        Files: ``restored.png``, ``kernel.png``, ``kernel.npy``, ``comparison.png``,
        ``report.json`` (last: it says that the rest is complete).
        """
        target = Path(folder)
        count = len(self.image)
        for index in range(count):
            place = target if count == 1 else target / f"{index:03d}"
            with atomic_folder(place) as partial:
                for name, content in self.files(index).items():
                    (partial / name).write_bytes(content)
        return target

    def split(self) -> list[DeblurResult]:
        """A result for each image of the batch, as if it had been deblurred by itself.

        Its seconds, evaluations and backward passes are its share of the batch's.
        """
        count, sizes = len(self.image), self.report.get("kernel_sizes")
        found = []
        for index in range(count):
            report = dict(self.report)
            for name in PER_IMAGE:
                if report.get(name):  # without tiles, there is a list of none
                    report[name] = [report[name][index]]
            for name in ("seconds", "network_evaluations", "backward_passes"):
                if name in report:
                    share = report[name] / count
                    report[name] = round(share, 3) if name == "seconds" else round(share)
            phases = report.get("seconds_by_phase", {})
            report["seconds_by_phase"] = {k: round(v / count, 3) for k, v in phases.items()}
            kernel = self.kernel[index : index + 1]
            if sizes is not None:
                report["kernel_size"] = sizes[index]
                frame = (kernel.shape[-1] - sizes[index]) // 2
                inside = slice(frame, kernel.shape[-1] - frame)
                kernel = kernel[..., inside, inside]
            found.append(
                DeblurResult(
                    self.image[index : index + 1],
                    kernel,
                    self.observation[index : index + 1],
                    [self.history[index]],
                    report,
                )
            )
        return found

    def files(self, index: int = 0) -> dict[str, bytes]:
        """What :meth:`save` writes for one image of the batch: contents by file name."""

        def png(picture: Image.Image) -> bytes:
            stream = BytesIO()
            picture.save(stream, "PNG")
            return stream.getvalue()

        image, planes = self.image[index], self.kernel[index]
        kernel = kernel_sheet(planes, self.report.get("grid", [1, 1])[1])
        array = BytesIO()
        np.save(array, (planes[0] if len(planes) == 1 else planes).numpy())
        report = self.report | {"history": self.history[index]}
        return {
            "restored.png": png(to_pil(image)),
            "kernel.png": png(kernel_picture(kernel)),
            "kernel.npy": array.getvalue(),
            "comparison.png": png(comparison_picture(self.observation[index], image, kernel)),
            "report.json": (json.dumps(report, indent=2) + "\n").encode(),
        }
