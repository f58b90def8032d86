"""The tab that deblurs a photograph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from latentdem.io import InputError, to_pil
from latentdem.serve import html, tasks
from latentdem.serve.jobs import Job, Snapshot
from latentdem.serve.page import EXAMPLES, PRIVATE, Downloads, Page, connect, number, whole

SIZES = [("384 pixels", 384), ("512 pixels", 512), ("768 pixels", 768), ("1024 pixels", 1024),
         ("as it is", 0)]  # fmt: skip
"""Longer sides to shrink to."""

STEPS = (
    "Choose a blurred photograph, or take an example.",
    "If you know how many pixels the blur is long, give a kernel size just above it.",
    "Press Deblur, and watch kernel and picture become clear. It takes a minute or two for "
    "each half a megapixel; noise and blur are found from the photograph alone.",
)


@lru_cache(maxsize=1)
def _drawn_example() -> Any:
    """A crop of scikit-image's photograph of a cat, blurred by a drawn hand's shake."""
    from latentdem.evaluate import observe
    from latentdem.operators.motion import random_motion_kernel

    return to_pil(observe("chelsea", random_motion_kernel(19, seed=3), 0.01, seed=0)[0][0])


def deblur_tab(page: Page) -> None:
    """Build the tab, within its ``gr.Tab``."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            photo = gr.Image(
                label="Blurred photograph",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=300,
                buttons=["fullscreen"],
                elem_id="photo",
            )
            with gr.Row(elem_classes="examples"):
                gr.HTML('<p class="hint">Examples:</p>', padding=False, min_width=10)
                for label, name in (("Number plate", "licenseplate_motion.jpg"),
                                    ("Text", "text_motion.jpg")):  # fmt: skip
                    if (EXAMPLES / name).exists():
                        gr.Button(label, size="sm").click(
                            lambda name=name: str(page.store.borrow(EXAMPLES / name)),
                            outputs=photo,
                            **PRIVATE,
                        )
                gr.Button("Cat, blurred by us", size="sm", elem_id="drawn-example").click(
                    lambda: str(page.store.draw("cat.png", _drawn_example())),
                    outputs=photo,
                    **PRIVATE,
                )
            with gr.Row():
                kernel_size = gr.Textbox(
                    label="Kernel size, pixels",
                    info="Odd, as long as the blur",
                    placeholder="automatic",
                    max_length=10,
                    min_width=130,
                    elem_id="kernel-size",
                )
                side = gr.Dropdown(
                    SIZES,
                    value=768,
                    label="Shrink to",
                    info="Longer side; less is faster",
                    min_width=130,
                    elem_id="side",
                )
            with gr.Accordion("More options", open=False, elem_id="more"):
                noise_std = gr.Textbox(
                    label="Noise, as a share of white",
                    info="Between 0 and 1, such as 0.01",
                    placeholder="estimated",
                    max_length=10,
                    elem_id="noise",
                )
                steps = gr.Slider(1, 40, value=16, step=1, label="Steps", elem_id="steps")
                seed = gr.Textbox("0", label="Seed", max_length=10, elem_id="seed")
                blurred = gr.Checkbox(
                    False, label="Deblur it even if it looks sharp", elem_id="assume-blurred"
                )
            with gr.Row():
                start = gr.Button("Deblur", variant="primary", elem_id="deblur-start")
                stop = gr.Button("Cancel", variant="stop", visible=False, elem_id="deblur-cancel")
        with gr.Column(scale=6, min_width=300):
            status = gr.HTML(
                html.welcome("How it goes", STEPS), padding=False, elem_id="deblur-status"
            )
            live = gr.Image(
                label="The picture as it stands",
                format="webp",
                interactive=False,
                visible=False,
                buttons=[],
                elem_id="deblur-live",
            )
            slider = gr.ImageSlider(
                label="Before and after",
                interactive=False,
                visible=False,
                buttons=["fullscreen"],
                elem_id="deblur-slider",
            )
            with gr.Row(visible=False) as details:
                with gr.Column(scale=2, min_width=200):
                    kernel = gr.Image(
                        label="Blur kernel",
                        format="png",
                        interactive=False,
                        buttons=[],
                        elem_classes="pixels",
                        elem_id="deblur-kernel",
                    )
                with gr.Column(scale=3, min_width=240):
                    facts = gr.HTML(padding=False, elem_id="deblur-facts")
            advice = gr.HTML(visible=False, padding=False)
            links = Downloads(
                ["restored.png", "kernel.png", "kernel.npy", "comparison.png", "report.json"],
                "deblur",
            )

    def run(
        path: str | None, size: str, longer: int, noise: str, count: float, start_number: str,
        always: bool, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        def make(folder: Path) -> Callable[[Job], tasks.DeblurAnswer]:
            if path is None:
                raise InputError("choose a photograph first, or take one of the examples")
            return tasks.deblur(
                tasks.DeblurRequest(
                    photo=Path(path),
                    side=longer or None,
                    kernel_size=whole(size, "the kernel size"),
                    noise_std=number(noise, "the noise"),
                    steps=whole(count, "steps"),
                    seed=whole(start_number, "the seed") or 0,
                    assume_blurred=always,
                ),
                folder,
                page.limits,
                page.models,
            )

        pace = html.Pace()
        shown = False
        for now in page.run((str(request.session_hash), "deblur"), make):
            frame = now.update
            change: dict[Any, Any] = {}
            if not shown:  # the result of the run before
                shown = True
                change = {
                    start: gr.update(visible=False),
                    stop: gr.update(visible=True, interactive=True, value="Cancel"),
                    slider: gr.update(visible=False, value=None),
                    details: gr.update(visible=False),
                    advice: gr.update(visible=False),
                    **links.hide(),
                }
            if now.state == "waiting":
                change[status] = html.waiting(now)
            elif now.state == "running":
                if now.fresh:
                    pace.add((frame.step + 1) / frame.steps, now.seconds)
                change[status] = _line(now, pace)
                if now.stopping:
                    change[stop] = gr.update(interactive=False, value="Stopping")
                if now.fresh:
                    change |= {
                        live: gr.update(visible=True, value=frame.image),
                        details: gr.update(visible=True),
                        kernel: frame.kernel,
                        facts: html.facts(frame.facts),
                    }
            else:
                change |= {
                    start: gr.update(visible=True),
                    stop: gr.update(visible=False),
                    live: gr.update(visible=False, value=None),
                }
                if now.state == "done":
                    answer: tasks.DeblurAnswer = now.result
                    change |= {
                        status: html.note(f"Done in {html.clock(now.seconds)}."),
                        slider: gr.update(
                            visible=True, value=(str(answer.before), str(answer.after))
                        ),
                        details: gr.update(visible=True),
                        kernel: str(answer.kernel),
                        facts: html.facts(answer.facts),
                        advice: gr.update(
                            visible=True, value="".join(map(html.note, answer.advice))
                        ),
                        **links.show(answer.files),
                    }
                else:
                    change |= {
                        status: html.ending(now, page.limits.seconds),
                        details: gr.update(visible=False),
                    }
            yield change

    outputs = [status, live, slider, details, kernel, facts, advice, *links.outputs]
    connect(
        page, "deblur", start, stop, run,
        [photo, kernel_size, side, noise_std, steps, seed, blurred], outputs,
    )  # fmt: skip

    def check(upload: dict[str, Any] | None) -> tuple[Any, Any]:
        problem = page.check_upload(upload)
        if problem:
            return None, html.note(problem, "error")
        return gr.skip(), html.welcome("How it goes", STEPS)

    # Before Gradio opens the file, whose own messages are not for visitors.
    photo.upload(check, photo, [photo, status], preprocess=False, **PRIVATE)


def _line(now: Snapshot, pace: html.Pace) -> str:
    if now.stopping:
        return html.progress("Stopping after this step", now.seconds, None, "")
    frame: tasks.DeblurFrame | None = now.update
    if frame is None:
        return html.progress("Finding the first kernel", now.seconds, None, "")
    done = frame.step + 1
    return html.progress(
        f"Step {done} of {frame.steps}", now.seconds, done / frame.steps, pace.left(now.seconds)
    )
