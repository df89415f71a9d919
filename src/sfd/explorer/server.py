"""The server: the page, and one worker that draws what the newest request asks for.

It listens on the loopback address alone. What reaches it from elsewhere through a browser is refused: a foreign Host
header (DNS rebinding), a foreign Origin, a cross-site request.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from sfd.explorer.compute import Request, Superseded, compute, facts
from sfd.explorer.page import render
from sfd.generation.model import Model
from sfd.utils.config import parse
from sfd.utils.errors import SFDError

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

ADDRESS = "127.0.0.1"
NAMES = {"127.0.0.1", "localhost"}
MAX_BODY = 1 << 16  # bytes of a request
MAX_CONNECTIONS = 16
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Answer = TypeVar("Answer")


class Worker:
    """One thread. A new piece of work makes all earlier ones stop at their next step."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explorer")
        self._newest = 0

    async def run(self, work: Callable[[Callable[[], bool]], Answer]) -> Answer:
        """Do `work(stop)`; it raises `Superseded` once `stop()` is true."""
        self._newest += 1
        number = self._newest
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, lambda: number != self._newest)

    def close(self) -> None:
        """Stop all work and wait for its end."""
        self._newest += 1
        self._pool.shutdown(cancel_futures=True)


def build_app(model: Model, known: dict[str, Any], port: int, worker: Worker, **settings: Any) -> ASGIApp:
    """Make the application: `GET /` is the page, `POST /compute` a drawing; nothing else exists."""
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    page = render(known)

    async def show(request: HTTPRequest) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    drawing = partial(draw, model=model, worker=worker, **settings)
    app = Starlette(routes=[Route("/", show), Route("/compute", drawing, methods=["POST"])])

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        reason = foreign(scope, port) if scope["type"] == "http" else None
        await (app if reason is None else _refusal(reason, 403))(scope, receive, send)

    return guarded


async def draw(request: HTTPRequest, *, model: Model, worker: Worker, **settings: Any) -> Response:
    """Answer a request for a drawing, or say in JSON what is wrong with it; `settings` are those of `serve`."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return _refusal("a request must be application/json", 415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            return _refusal(f"a request may have {MAX_BODY} bytes", 413)
    try:
        asked = parse(Request, _record(body), "request")
        return _json(await worker.run(lambda stop: compute(model, asked, stop, **settings)))
    except SFDError as error:
        return _refusal(str(error), 400)
    except Superseded:
        return _refusal("a newer request took its place", 409)


def _json(value: Any, status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, headers=HEADERS)


def _refusal(message: str, status: int) -> Response:
    return _json({"error": message}, status)


def foreign(scope: Scope, port: int) -> str | None:
    """Say why a request is not from this server's own page; None: it is."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    if not all(_own(f"//{host}", port) for host in headers.get("host", [""])):
        return "this server answers on the loopback address only"
    if not all(origin.startswith("http:") and _own(origin, port) for origin in headers.get("origin", [])):
        return "requests from other sites are refused"
    if not set(headers.get("sec-fetch-site", [])) <= {"same-origin", "none"}:
        return "requests from other sites are refused"
    return None


def _own(address: str, port: int) -> bool:
    try:
        parts = urlsplit(address)
        return parts.netloc == f"{parts.hostname}:{parts.port}" and parts.hostname in NAMES and parts.port == port
    except ValueError:
        return False


def _record(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SFDError("a request must be a JSON object")
    return value


def serve(model: Model, name: str, port: int, announce: Callable[[str], None], **settings: Any) -> None:
    """Serve the explorer until Ctrl-C.

    Args:
        model: the generator.
        name: of the model, shown on the page.
        port: on the loopback address; 0: any that is free.
        announce: is given the page's address once the server listens.
        settings: fields of `SamplingConfig` that differ from the model's own; those with a control are its first value.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise SFDError("the explorer needs starlette and uvicorn; run pip install 'sfd[explore]'") from None

    known = facts(model, name, **settings)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
            listener.listen()
        except OSError as error:
            raise SFDError(
                f"port {port} is not free ({error.strerror}); give another by --port, or --port 0 for any that is free"
            ) from None
        port = listener.getsockname()[1]
        worker = Worker()
        options = {"log_level": "warning", "ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 2}
        app = build_app(model, known, port, worker, **settings)
        config = uvicorn.Config(app, limit_concurrency=MAX_CONNECTIONS, server_header=False, **options)
        announce(f"http://{ADDRESS}:{port}/")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass  # the way to end it
        finally:
            worker.close()
