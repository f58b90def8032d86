"""The course of a run in pictures: a preview while it runs, an animation when it is done."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw

from latentdem.em.steps import StepReport
from latentdem.io import kernel_picture, kernel_sheet, to_pil

PREVIEW = "preview.png"
TRACE = "trace.webp"
FRAMES = 100


class Trace:
    """Collects frames: the image as it stands, the kernel inset, the noise level below.

    Args:
        preview: file that is renewed with every frame (whole at every moment); none by default.
        side: longer side of a frame in pixels; larger images are shrunk.

    >>> trace = Trace()
    >>> latentdem.deblur(photo, progress=lambda i, n, report: trace.add(report))  # doctest: +SKIP
    >>> trace.save("trace.webp")  # doctest: +SKIP
    """

    def __init__(self, preview: Path | None = None, *, side: int = 512) -> None:
        self.preview, self.side = preview, side
        self.frames: list[Image.Image] = []

    def add(self, report: StepReport) -> None:
        """Draw one step; of a long run no more than about a hundred, and the last one."""
        every = max(1, report.steps // FRAMES)
        if report.step % every and report.step + 1 < report.steps:
            return
        image = report.image
        scale = self.side / max(image.shape[-2:])
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.shape[-2:]]
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        picture = to_pil(image[0]).convert("RGB")
        inset = kernel_picture(kernel_sheet(report.kernel[0]), max(24, min(picture.size) // 4))
        bar = 16
        frame = Image.new("RGB", (picture.width, picture.height + bar), "white")
        frame.paste(picture, (0, 0))
        frame.paste(inset.convert("RGB"), (0, 0))
        draw = ImageDraw.Draw(frame)
        draw.rectangle((0, 0, *inset.size), outline="white")
        caption = f"{report.step + 1}/{report.steps}  t = {report.timestep}"
        draw.text((4, picture.height + 2), caption, fill="black")
        self.frames.append(frame)
        if self.preview is not None:
            partial = self.preview.with_suffix(".partial")
            frame.save(partial, format="PNG")
            partial.replace(self.preview)

    def save(self, path: str | Path, *, milliseconds: int = 300) -> Path:
        """Write a looping animation (webp); its last frame stays for two seconds.

        Raises:
            ValueError: no step has been drawn.
        """
        if not self.frames:
            raise ValueError("the trace is empty: no step has been drawn")
        path = Path(path)
        partial = path.with_suffix(".partial")
        self.frames[0].save(
            partial,
            format="WEBP",
            save_all=True,
            append_images=self.frames[1:],
            duration=[milliseconds] * (len(self.frames) - 1) + [2000],
            loop=0,
            quality=85,
            method=2,
        )
        partial.replace(path)
        return path
