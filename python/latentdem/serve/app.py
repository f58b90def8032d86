"""The page as an application that a server can run."""

from __future__ import annotations

from html import escape
from typing import Any

import fastapi
import gradio as gr

from latentdem.serve import html
from latentdem.serve.deblur_tab import deblur_tab
from latentdem.serve.files import MEGABYTE, Store
from latentdem.serve.jobs import Limits, Worker
from latentdem.serve.models import Models
from latentdem.serve.objects_tab import objects_tab
from latentdem.serve.page import Page

FONT = ["system-ui", "sans-serif"]


def build_page(page: Page) -> gr.Blocks:
    """The page itself; its environment must name the folder of ``page.store``."""
    limits = page.limits
    with gr.Blocks(title="latentdem", analytics_enabled=False) as blocks:
        gr.HTML(
            "<h1>latentdem</h1><p class='hint'>A sharp picture and the blur that spoiled it, from "
            "one photograph; an object and its cameras, from two.</p>",
            padding=False,
        )
        with gr.Tab("Deblur", id="deblur"):
            deblur_tab(page)
        with gr.Tab("Objects", id="objects"):
            objects_tab(page)
        gr.HTML(
            f"<p class='hint'>Everything is computed on the machine that this page comes from. "
            f"Pictures up to {limits.megapixels:g} megapixels and {limits.megabytes:g} MB; a "
            f"request may compute for {limits.seconds:g} seconds; uploads and results are deleted "
            f"after {limits.keep_minutes:g} minutes.</p>",
            padding=False,
        )

        described = page.models.described()
        if described:
            gr.HTML(f"<p class='hint'>{escape(described)}.</p>", padding=False, elem_id="models")

        def leave(request: gr.Request) -> None:
            page.leave(str(request.session_hash))

        blocks.unload(leave)
    blocks.queue(max_size=256, api_open=False)
    return blocks


def build_app(worker: Worker, store: Store, limits: Limits, models: Models | None = None) -> Any:
    """An ASGI application; nothing of it but the files of ``store`` is served.

    The address of no other server is in the page, and Gradio's telemetry, history, monitoring,
    programmatic interface and sharing are off.
    """
    theme = gr.themes.Default(
        primary_hue="blue", secondary_hue="blue", font=FONT, font_mono=["ui-monospace", "monospace"]
    ).set(
        # Gradio's greys are too faint to read.
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color_dark="*neutral_400",
    )
    blocks = build_page(Page(worker, store, limits, models))
    # Gradio looks whether a file that a request names was uploaded only where this is set, and
    # sets it in launch() alone.  The gate looks, too.
    blocks.has_launched = True
    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=True,
        max_file_size=int(limits.megabytes * MEGABYTE),
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=html.CSS,
    )
