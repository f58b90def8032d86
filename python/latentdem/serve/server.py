"""The server: a socket, a private folder, the page, and the order they end in."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdem.io import InputError
from latentdem.serve.files import Store
from latentdem.serve.gate import Gate, is_local
from latentdem.serve.jobs import Limits, Worker
from latentdem.serve.models import Models

_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass
class Server:
    """A server that listens already; :meth:`run` serves.

    Args:
        url: of the page.
        store: its files.
        worker: its jobs.
    """

    url: str
    store: Store
    worker: Worker
    _server: Any
    _socket: socket.socket

    def run(self) -> None:
        """Serve until SIGINT (raised as KeyboardInterrupt) or SIGTERM (as SystemExit).

        Either is raised once the server has ended, never amid its start. A second SIGINT does not
        wait for open connections.
        """
        received: list[int] = []

        def end(number: int, frame: Any) -> None:
            if received:
                raise KeyboardInterrupt
            received.append(number)
            self._server.should_exit = True

        # Ours hold until uvicorn's handlers do: by themselves an early Ctrl-C tears a half-made
        # event loop, which then complains. When it has ended, uvicorn raises what it got again.
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._server.run(sockets=[self._socket])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if signal.SIGINT in received:
            raise KeyboardInterrupt
        if received:
            raise SystemExit(0)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port`` (0: any free one).

    Raises:
        InputError: the port is taken, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError):
        raise InputError(
            f"host '{host}' is not known; 127.0.0.1 is this machine, 0.0.0.0 all its networks"
        ) from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        # Now, not when the server starts: without it a second server could bind as well.
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {host}, port {port} ({reason}); is it taken? "
            "Choose another one with --port, or 0 for any"
        ) from None
    return found


@contextlib.contextmanager
def open_server(
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 0,
    models: Callable[[], Models] = Models,
) -> Iterator[Server]:
    """A server for the page, with a private folder that is removed at the end.

    Args:
        limits: of uploads and requests.
        host: to listen on; by default only this machine reaches it.
        port: to listen on; 0: any free one.
        models: makes what the page works with, by default of the packaged priors; called when the
            port is ours, so that one that is taken is said before weights are read.

    Raises:
        InputError: Gradio is not installed, or the port cannot be had.
        FileNotFoundError: of ``models``.
        ValueError: of ``models``.

    >>> with open_server(Limits(), port=7860) as server:  # doctest: +SKIP
    ...     server.run()
    """
    bound = listen(host, port)
    with contextlib.ExitStack() as stack:
        stack.callback(bound.close)
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="latentdem-serve-"))
        # Read by Gradio when it is imported, and when components are made.
        stack.enter_context(_environment(_ENVIRONMENT | {"GRADIO_TEMP_DIR": root}))
        try:
            import uvicorn

            from latentdem.serve.app import build_app
        except ModuleNotFoundError as error:
            raise InputError(
                f'the page needs Gradio ({error.name} is missing): pip install "latentdem[serve]"'
            ) from None
        store = Store(Path(root), limits.keep_minutes)
        stack.callback(store.close)
        worker = Worker(limits.waiting)
        stack.callback(worker.close)
        address, number = bound.getsockname()[:2]
        gate = Gate(build_app(worker, store, limits, models()), store, local=is_local(host))
        config = uvicorn.Config(
            gate,
            log_level="critical",
            access_log=False,
            # Pages keep a connection open for as long as they are shown.
            timeout_graceful_shutdown=1,
            server_header=False,
            forwarded_allow_ips="",
            proxy_headers=False,
        )
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        shown = f"[{shown}]" if ":" in shown else shown
        url = f"http://{shown}:{number}"
        yield Server(url, store, worker, uvicorn.Server(config), bound)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
