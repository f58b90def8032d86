"""``latentdem serve``: a page to try the project."""

from __future__ import annotations

from typing import Annotated

import typer

from latentdem.cli import app
from latentdem.cli_common import DeviceOption, DtypeOption, console
from latentdem.cli_common import fail as _fail


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Default: only this machine reaches it.")
    ] = "127.0.0.1",
    max_megapixels: Annotated[float, typer.Option(help="Largest picture.")] = 24.0,
    max_megabytes: Annotated[float, typer.Option(help="Largest file.")] = 25.0,
    time_limit: Annotated[
        float, typer.Option(help="Seconds that a request may compute; then it is stopped.")
    ] = 900.0,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait while one computes.")
    ] = 4,
    keep_minutes: Annotated[
        float, typer.Option(help="Uploads and results are deleted after so long, and at the end.")
    ] = 60.0,
    prior: Annotated[
        str | None,
        typer.Option(help="Of photographs: file, folder or hub id, as in deblur."),
    ] = None,
    objects_prior: Annotated[
        str | None,
        typer.Option(help="Of objects, as in reconstruct."),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = False,
) -> None:
    """Try it in the browser: deblur photographs, reconstruct objects, watch them evolve.

    Everything stays on this machine: the page asks nothing of other servers. One request computes
    at a time. Ctrl-C ends it, and removes all uploads and results.

    `latentdem serve --open`

    `latentdem serve --prior stable-diffusion --objects-prior stable-zero123 --device cuda`

    Needs `pip install "latentdem[serve]"`.
    """
    from latentdem.serve.gate import is_local
    from latentdem.serve.jobs import Limits
    from latentdem.serve.models import Models
    from latentdem.serve.server import open_server

    try:
        limits = Limits(
            megapixels=max_megapixels,
            megabytes=max_megabytes,
            seconds=time_limit,
            waiting=max_waiting,
            keep_minutes=keep_minutes,
        )

        def models() -> Models:
            if prior is not None or objects_prior is not None:
                console.print("loading the priors")
            return Models.load(prior, objects_prior, device=device, dtype=dtype)

        with open_server(limits, host, port, models) as server:
            if not is_local(host):
                console.print(
                    f"warning: whoever reaches {host} over the network can use this page, without "
                    "a password",
                    style="yellow",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            console.print(
                f"open {server.url} in a browser; Ctrl-C ends it", highlight=False, soft_wrap=True
            )
            if open_browser:
                import webbrowser

                webbrowser.open(server.url)
            server.run()
    except (ValueError, FileNotFoundError) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        console.print("ended; uploads and results are removed")
