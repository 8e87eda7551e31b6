"""The web application: the page, and its requests in JSON. Computing is the workbench's, waiting is that of Turns."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..cli import finite
from ..data import to_png
from ..errors import UserError
from .turns import Busy, Stopped, Turns
from .workbench import MOST_BYTES, PREVIEW, Gone, Workbench, recipe_of

MOST_JSON, MOST_UPLOADS = 2**16, 2  # bytes of a request; files that are read at once
MOST_SECONDS = 30  # until a request is there
LOG = logging.getLogger(__name__)
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/server.js": ("server.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# A browser fetches nothing from anywhere else, whatever the page says.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
VISITOR = re.compile(r"[0-9a-f]{16,64}")

Handler = Callable[[Workbench, dict[str, Any], Callable[[int], None]], Any]


def _recipe(asked: dict[str, Any]):
    name = "preview" if asked.get("preview") is True else asked.get("recipe", "fast")
    return recipe_of(name, asked.get("solver"), asked.get("steps"))


def _rank(what: str, asked: dict[str, Any]) -> int:
    """What follows a slider goes first, then the picture where it rests."""
    return 2 if what != "edit" else 0 if asked.get("preview") is True else 1


# What may be asked for: a function of the workbench, the request's values and ``stop``.
REQUESTS: dict[str, Handler] = {
    "edit": lambda bench, a, stop: bench.edit(a.get("image"), a.get("scales", {}), _recipe(a), stop),
    "latents": lambda bench, a, stop: bench.latents(a.get("image"), a.get("scales", {}), _recipe(a), stop),
    "reconstruct": lambda bench, a, stop: bench.reconstruct(a.get("image"), _recipe(a), stop),
    "interpolate": lambda bench, a, stop: bench.interpolate(
        a.get("a"), a.get("b"), a.get("kind", "latent"), a.get("frames", 9), _recipe(a), stop
    ),
    "sample": lambda bench, a, stop: bench.sample(
        a.get("count", 1), a.get("seed", 0), _recipe(a), a.get("attribute"), a.get("without"), a.get("like", ()), stop
    ),
    "inside": lambda bench, a, stop: bench.inside(a.get("image"), a.get("times", 8), stop),
}


def application(
    bench: Workbench, hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]"), turns: Turns | None = None
) -> Starlette:
    """The page and its requests; ``hosts``: names under which it answers, "*" for any."""
    turns, uploads = turns or Turns(), asyncio.Semaphore(MOST_UPLOADS)
    page = {path: files(__package__).joinpath("page", name).read_bytes() for path, (name, _) in PAGE.items()}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        turns.close()

    async def static(request: Request) -> Response:
        return Response(
            page[request.url.path], media_type=PAGE[request.url.path][1], headers={"Cache-Control": "no-cache"}
        )

    async def model(request: Request) -> Response:
        return JSONResponse(bench.describe())

    async def image(request: Request) -> Response:
        # Not in turn: reading a small file need not wait for a computation.
        key = request.path_params["key"]
        content = await asyncio.to_thread(lambda: to_png(bench.offered(key).image[0]))
        return Response(content, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    async def upload(request: Request) -> Response:
        _visitor(request)
        name = request.query_params.get("name", "upload")
        async with uploads:
            content = await _body(request, MOST_BYTES)
            return _answer(await asyncio.to_thread(lambda: _plain(bench.upload(content, name))))

    async def compute(request: Request) -> Response:
        what, visitor = request.path_params["what"], _visitor(request)
        if what not in REQUESTS:
            raise UserError("there is no such request")
        asked = _values(await _body(request, MOST_JSON))

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        def job(stop: Callable[[int], None]) -> Any:
            return _plain(REQUESTS[what](bench, asked, stop))

        return _answer(await turns.run(visitor, what, job, left, _rank(what, asked)))

    routes = [
        *(Route(path, static) for path in PAGE),
        Route("/api/model", model),
        Route("/api/image/{key}.png", image),
        Route("/api/upload", upload, methods=["POST"]),
        Route("/api/{what}", compute, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)), Middleware(_Headers)],
        exception_handlers={UserError: _refused, Stopped: _stopped, ClientDisconnect: _stopped, Exception: _failed},
    )
    app.state.turns = turns
    return app


def warm_up(bench: Workbench) -> None:
    """Compute what the page opens with, so that the first visitor need not wait for it."""
    if bench.describe()["autoencoder"] and bench.opening:
        try:
            picture = bench.picture(bench.opening[0])
        except UserError:  # a broken image, of which the page will say so
            return
        for recipe in (PREVIEW, recipe_of()):
            bench.latent(picture, recipe)


# -- what comes in -------------------------------------------------------------------------------------------------


def _visitor(request: Request) -> str:
    """Who asks. A page of another origin cannot send this header, so it cannot make a browser ask for anything."""
    visitor = request.headers.get("x-visitor", "")
    if not VISITOR.fullmatch(visitor):
        raise UserError("the header X-Visitor is missing; expected hexadecimal digits that the page draws")
    return visitor


async def _body(request: Request, most: int) -> bytes:
    async def read() -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise UserError(f"too large; at most {most >> 20} MiB" if most >= 2**20 else "the request is too large")
        return bytes(content)

    try:
        return await asyncio.wait_for(read(), MOST_SECONDS)
    except asyncio.TimeoutError:
        raise UserError(f"the request did not arrive within {MOST_SECONDS} seconds") from None


def _values(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError("the request is not JSON; expected an object")
    return values


# -- what goes out -------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it, or bytes as they are: images become data of PNG files, films of GIF files."""
    return value if isinstance(value, bytes) else finite(_inner(value))


def _inner(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return "data:image/png;base64," + base64.b64encode(to_png(value)).decode()
    if isinstance(value, bytes):
        return "data:image/gif;base64," + base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: _inner(v) for key, v in value.items()}
    return [_inner(v) for v in value] if isinstance(value, (list, tuple)) else value


def _answer(value: Any) -> Response:
    return Response(value, media_type="application/octet-stream") if isinstance(value, bytes) else JSONResponse(value)


async def _refused(request: Request, error: Exception) -> Response:
    gone = {"gone": error.key} if isinstance(error, Gone) else {}
    return JSONResponse({"error": str(error), **gone}, status_code=503 if isinstance(error, Busy) else 400)


async def _stopped(request: Request, error: Exception) -> Response:
    return JSONResponse({"stopped": True}, status_code=409)


async def _failed(request: Request, error: Exception) -> Response:
    # Starlette raises it again, and the server logs it; the visitor learns nothing about this machine.
    return JSONResponse({"error": "the server failed; its log says why"}, status_code=500, headers=HEADERS)


class _Headers:
    """Adds HEADERS to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)
