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
