"""The OpenAPI document, and a page that shows it.

Callers may read the document without a key. The page is a megabyte of third-party JavaScript (Swagger UI, from the
package swagger-ui-bundle-v2). It loads nothing from other hosts. The operations listener serves it, and with
GATEWAY_API_DOCS=on the API's listener too.
"""

from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from swagger_ui_bundle import swagger_ui_path

from gateway.errors import Overloaded
from gateway.web.answers import refuse
from gateway.web.connections import SLOT

PATH = "/openapi.json"
PAGE = "/docs"
METHODS = "GET, HEAD"
# The part of a file that is in memory for each reader, however slow. The default of aiohttp is 256 KiB.
CHUNK_BYTES = 16 * 1024
# Unanswered requests for the document and the files, for each listener of each process. A caller needs no key for
# them, and may read slowly: without a limit, each of 8,192 connections could hold 74 kB (tests/hostile/test_memory.py).
# The operations listener has twice as many connections, so readers leave some to the probes.
MAX_READERS = 32
TOO_MANY_READERS = "Too many are reading the documentation. Send the request again"

ExpectHandler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]

_DOCUMENT = resources.files("gateway.web").joinpath("openapi.json").read_bytes()
_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
PAGE_PATHS = (PAGE, f"{PAGE}/show.js", *(f"{PAGE}/{name}" for name in _ASSETS))
_SCRIPT = """\
SwaggerUIBundle({
  url: "openapi.json", dom_id: "#document", docExpansion: "full", defaultModelsExpandDepth: 3,
  supportedSubmitMethods: [],  // for reading: it sends nothing
});
"""
_HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>SMS gateway: the API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
<div id="document"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/show.js"></script>
"""
# Swagger UI styles its elements inline, and its icons are data URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)


class _Readers:
    """The readers of one listener."""

    def __init__(self) -> None:
        self.count = 0


class _Reader:
    """The place of one reader, until its answer is written. Raises Overloaded if none is free."""

    def __init__(self, readers: _Readers) -> None:
        if readers.count == MAX_READERS:
            raise Overloaded(TOO_MANY_READERS)
        readers.count += 1
        self._readers: _Readers | None = readers

    def give_back(self) -> None:
        """Give the place to another reader."""
        if self._readers is not None:
            self._readers.count -= 1
            self._readers = None

    def abandon(self) -> None:
        """Do nothing: the place is given back once aiohttp stops writing."""


def add_document(app: web.Application, expect_handler: ExpectHandler | None = None) -> None:
    """Add the route of the document."""
    _add_routes(app, {PATH: _show}, expect_handler)


def add_page(app: web.Application, expect_handler: ExpectHandler | None = None) -> None:
    """Add the routes of the document, and of the page and its files."""
    files: list[Handler] = [_file(swagger_ui_path / name) for name in _ASSETS]
    handlers = dict(zip(PAGE_PATHS, (_page, _script, *files), strict=True))
    _add_routes(app, {PATH: _show, **handlers}, expect_handler)


def _add_routes(app: web.Application, handlers: dict[str, Handler], expect_handler: ExpectHandler | None) -> None:
    readers = _Readers()

    def bounded(handler: Handler) -> Handler:
        async def serve(request: web.Request) -> web.StreamResponse:
            try:
                request[SLOT] = _Reader(readers)
            except Overloaded as error:
                response = refuse(error)
                response.force_close()  # so that the connection's next requests take nothing from others
                return response
            return await handler(request)

        return serve

    for path, handler in handlers.items():
        app.router.add_get(path, bounded(handler), expect_handler=expect_handler)


async def _show(_request: web.Request) -> web.Response:
    return web.Response(body=_DOCUMENT, headers={hdrs.CONTENT_TYPE: "application/json"})


async def _page(_request: web.Request) -> web.Response:
    return web.Response(text=_HTML, content_type="text/html", headers={"Content-Security-Policy": _POLICY})


async def _script(_request: web.Request) -> web.Response:
    return web.Response(text=_SCRIPT, content_type="text/javascript")


def _file(path: Path) -> Handler:
    async def serve(_request: web.Request) -> web.FileResponse:
        return web.FileResponse(path, chunk_size=CHUNK_BYTES)

    return serve
