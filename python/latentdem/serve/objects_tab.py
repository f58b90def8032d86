"""The tab that reconstructs an object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from latentdem.serve import html, tasks
from latentdem.serve.jobs import Job, Snapshot
from latentdem.serve.page import EXAMPLES, PRIVATE, TYPES, Downloads, Page, connect, number, whole

STEPS = (
    "Choose two or more pictures of one object, up to about 90 degrees apart, on a plain ground or "
    "cut out with an alpha channel.",
    "Press Reconstruct. It finds where each camera stood, and what the object looks like from "
    "other sides; this takes a minute or two.",
)
PACKAGED = (
    "The model saw coloured toys at 64 x 64 pixels: expect shapes and colours, no fine detail."
)
PHASES = {
    "poses": "Finding where the cameras stood",
    "views": "Drawing views from other sides",
    "field": "Fitting the radiance field",
    "mesh": "Extracting the surface",
}


def objects_tab(page: Page) -> None:
    """Build the tab, within its ``gr.Tab``."""
    steps = (*STEPS, PACKAGED) if page.models.packaged_objects else STEPS
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            views = gr.Gallery(
                label="Pictures of one object",
                type="filepath",
                file_types=TYPES,
                columns=2,
                height=240,
                object_fit="contain",
                allow_preview=False,
                interactive=True,
                buttons=[],
                elem_id="views",
            )
            given = [EXAMPLES / name for name in ("object_front.png", "object_side.png")]
            if all(path.exists() for path in given):
                with gr.Row(elem_classes="examples"):
                    gr.HTML('<p class="hint">Example:</p>', padding=False, min_width=10)
                    gr.Button("A toy, two pictures", size="sm", elem_id="objects-example").click(
                        lambda: [str(page.store.borrow(path)) for path in given],
                        outputs=views,
                        **PRIVATE,
                    )
            with gr.Accordion("Options", open=False):
                elevation = gr.Textbox(
                    label="Elevation of the first camera, degrees",
                    info="Its height above the object's horizon",
                    placeholder="estimated",
                    max_length=10,
                    elem_id="elevation",
                )
                rounds = gr.Slider(
                    1, 4, value=2, step=1, label="Rounds of drawing and fitting, at most",
                    elem_id="rounds",
                )  # fmt: skip
                seed = gr.Textbox("0", label="Seed", max_length=10)
            with gr.Row():
                start = gr.Button("Reconstruct", variant="primary", elem_id="objects-start")
                stop = gr.Button("Cancel", variant="stop", visible=False, elem_id="objects-cancel")
        with gr.Column(scale=6, min_width=300):
            status = gr.HTML(
                html.welcome("How it goes", steps), padding=False, elem_id="objects-status"
            )
            # Path of the last mesh, "none" if it had none, None before the first result.
            surface = gr.State()
            with gr.Row(visible=False) as shapes:
                mesh = gr.Model3D(
                    label="Surface; drag to turn",
                    interactive=False,
                    height=304,
                    clear_color=(1.0, 1.0, 1.0, 1.0),
                    min_width=220,
                    buttons=[],
                    elem_id="mesh",
                )
                turntable = gr.Image(
                    label="Radiance field",
                    interactive=False,
                    min_width=220,
                    buttons=[],
                    elem_id="turntable",
                )
            poses = gr.HTML(visible=False, padding=False, elem_id="poses")
            sheet = gr.Image(
                label="Given views beside their renderings, then views from all sides",
                interactive=False,
                visible=False,
                buttons=["fullscreen"],
                elem_id="sheet",
            )
            advice = gr.HTML(visible=False, padding=False)
            links = Downloads(
                [
                    "mesh.glb",
                    "turntable.webp",
                    "novel_views.png",
                    "poses.json",
                    "field.safetensors",
                    "report.json",
                ],
                "objects",
            )

    def run(
        chosen: list[tuple[str, str | None]] | None, height: str, count: float,
        start_number: str, before: str | None, request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        def make(folder: Path) -> Callable[[Job], tasks.ObjectsAnswer]:
            asked = tasks.ObjectsRequest(
                views=[Path(path) for path, _ in chosen or []],
                elevation=number(height, "the elevation"),
                rounds=whole(count, "rounds"),
                seed=whole(start_number, "the seed") or 0,
            )
            return tasks.reconstruct(asked, folder, page.limits, page.models)

        pace = html.Pace()
        shown = False
        for now in page.run((str(request.session_hash), "objects"), make):
            change: dict[Any, Any] = {}
            if not shown:  # the result of the run before
                shown = True
                # Once shown, the viewer is hidden, not taken away: that would be an error to it.
                change = {
                    start: gr.update(visible=False),
                    stop: gr.update(visible=True, interactive=True, value="Cancel"),
                    shapes: gr.update(visible="hidden" if before else False),
                    poses: gr.update(visible=False),
                    sheet: gr.update(visible=False, value=None),
                    advice: gr.update(visible=False),
                    **links.hide(),
                }
            if now.state == "waiting":
                change[status] = html.waiting(now)
            elif now.state == "running":
                if now.fresh:
                    pace.add(now.update.share, now.seconds)
                change[status] = _line(now, pace)
                if now.stopping:
                    change[stop] = gr.update(interactive=False, value="Stopping")
            else:
                change |= {start: gr.update(visible=True), stop: gr.update(visible=False)}
                if now.state == "done":
                    answer: tasks.ObjectsAnswer = now.result
                    warnings = "".join(html.note(line, "warning") for line in answer.warnings)
                    head = ("Picture", "Elevation", "Azimuth", "Distance")
                    change |= {
                        status: html.note(f"Done in {html.clock(now.seconds)}."),
                        shapes: gr.update(visible=True),
                        surface: str(answer.mesh) if answer.mesh else "none",
                        turntable: str(answer.turntable),
                        poses: gr.update(visible=True, value=html.facts(answer.poses, head)),
                        sheet: gr.update(visible=True, value=str(answer.sheet)),
                        advice: gr.update(visible=bool(warnings), value=warnings),
                        **links.show(answer.files),
                    }
                else:
                    change[status] = html.ending(now, page.limits.seconds)
            yield change

    def show_surface(path: str | None) -> Any:
        if path is None:
            return gr.skip()
        there = path != "none"
        return gr.update(value=path if there else None, visible=True if there else "hidden")

    outputs = [status, shapes, surface, turntable, poses, sheet, advice, *links.outputs]
    inputs = [views, elevation, rounds, seed, surface]
    event = connect(page, "objects", start, stop, run, inputs, outputs)
    # Apart, as the last values of a generator reach the page twice, which leaves the viewer empty.
    event.then(show_surface, surface, mesh, **PRIVATE)

    def check(uploads: list[dict[str, Any]] | None) -> tuple[Any, Any]:
        kept, problems = [], []
        for item in uploads or []:
            picture = item.get("image") or item.get("video") or {}
            problem = page.check_upload(picture)
            if problem:
                problems.append(problem)
            elif picture:
                kept.append(picture["path"])
        if problems:
            return kept or None, "".join(html.note(line, "error") for line in problems)
        return gr.skip(), html.welcome("How it goes", steps)

    views.upload(check, views, [views, status], preprocess=False, **PRIVATE)


def _line(now: Snapshot, pace: html.Pace) -> str:
    if now.stopping:
        return html.progress("Stopping after this step", now.seconds, None, "")
    frame: tasks.ObjectsFrame | None = now.update
    if frame is None:
        return html.progress("Reading the pictures", now.seconds, None, "")
    text = PHASES.get(frame.phase, frame.phase)
    line = html.progress(text, now.seconds, frame.share, pace.left(now.seconds))
    return line + html.phases(list(PHASES.values()), text)
