"""What reaches the page's server: the routes that the page uses, from the page itself.

Gradio has many more routes, among them ones that fetch addresses from the network on behalf of
whoever asks.  This layer lies around all of them, and does not depend on their checks.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any
from urllib.parse import urlsplit

from latentdem.serve.files import Store

ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/[^?]*|gradio_api/"
    r"(info|startup-events|upload|upload_progress|queue/(join|data)|reset|cancel|heartbeat/\w+"
    r"|file=.*))/?",
    re.DOTALL,
)
FILE = "/gradio_api/file="
LARGEST_MESSAGE = 1_000_000
"""Bytes of a request that is no upload: settings, and where the uploads are."""

HEADERS = {
    # The browser refuses whatever a library might want to load from elsewhere.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; media-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def is_local(host: str | None) -> bool:
    """Whether only this machine reaches ``host``.

    >>> is_local("127.0.0.1"), is_local("localhost"), is_local("127.example.com")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI application around another one.

    Args:
        app: what is behind it.
        store: files that may be read.
        local: whether only names of this machine are answered, so that no other site's name can
            be pointed at it.
    """

    def __init__(self, app: Any, store: Store, *, local: bool) -> None:
        self.app, self.store, self.local = app, store, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        body = None
        if refusal is None and scope["method"] == "POST" and not _is_upload(scope):
            body = await _read(receive)
            refusal = (413, "the request is too long") if body is None else self._message(body)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        given = receive if body is None else _replay(body, receive)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", []), *named]}
            await send(message)

        await self.app(scope, given, send_with_headers)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and reason, or None if the request may pass."""
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname
            foreign = origin is not None and urlsplit(origin).netloc != host
        except ValueError:  # such as half an IPv6 address
            return 400, "these are no addresses"
        if self.local and not is_local(name):
            return 403, "this server answers to 127.0.0.1 and localhost only"
        if foreign:
            return 403, "requests of other sites are refused"
        path = scope["path"]
        if not ROUTES.fullmatch(path):
            return 404, "there is nothing here"
        if path.startswith(FILE) and not self.store.holds(path.removeprefix(FILE)):
            return 403, "no such file, or its time is over"
        return None

    def _message(self, body: bytes) -> tuple[int, str] | None:
        """The same for what is posted: files that it names must have been uploaded.

        Gradio would copy any other file of the machine into its folder, or fetch an address.
        """
        try:
            found = [json.loads(body)] if body else []
        except (ValueError, RecursionError):
            return 400, "this is no JSON"
        while found:
            value = found.pop()
            if isinstance(value, dict):
                path = value.get("path")
                if path is not None and not (isinstance(path, str) and self.store.holds(path)):
                    return 403, "only uploaded files are taken; choose the picture again"
                found += value.values()
            elif isinstance(value, list):
                found += value
        return None


def _is_upload(scope: Any) -> bool:
    return scope["path"].rstrip("/") == "/gradio_api/upload"


async def _read(receive: Any) -> bytes | None:
    """The body, unless it is too long."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if len(body) > LARGEST_MESSAGE:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Any) -> Any:
    """``receive`` from the start."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    headers += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
