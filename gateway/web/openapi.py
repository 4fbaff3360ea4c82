"""The OpenAPI document, for programs; and a page that shows it, for people behind the operations port.

The document is data that callers may have without a key. The page is a megabyte of somebody else's JavaScript (Swagger
UI, from the package swagger-ui-bundle-v2): it is not served where callers connect, and asks nothing of any other host.
"""

from importlib import resources
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from swagger_ui_bundle import swagger_ui_path

from gateway.web import api

PAGE = "/docs"

_DOCUMENT = resources.files("gateway.web").joinpath("openapi.json").read_bytes()
_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
_SHOW = """\
SwaggerUIBundle({
  url: "openapi.json", dom_id: "#document", docExpansion: "full", defaultModelsExpandDepth: 3,
  supportedSubmitMethods: [],  // the API listens elsewhere: a browser would not reach it from here
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
# Swagger UI styles its elements inline, and draws its icons from data URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)


async def openapi(_request: web.Request) -> web.Response:
    """The document, as it lies in the package."""
    return web.Response(body=_DOCUMENT, headers={hdrs.CONTENT_TYPE: "application/json", hdrs.SERVER: "sms-gateway"})


def add_page(app: web.Application) -> None:
    """Add the page, what it loads, and the document."""
    app.router.add_get(api.OPENAPI, openapi)
    app.router.add_get(PAGE, _page)
    app.router.add_get(f"{PAGE}/show.js", _show)
    for name in _ASSETS:
        app.router.add_get(f"{PAGE}/{name}", _file(swagger_ui_path / name))


async def _page(_request: web.Request) -> web.Response:
    return web.Response(text=_HTML, content_type="text/html", headers={"Content-Security-Policy": _POLICY})


async def _show(_request: web.Request) -> web.Response:
    return web.Response(text=_SHOW, content_type="text/javascript")


def _file(path: Path) -> Handler:
    async def serve(_request: web.Request) -> web.FileResponse:
        return web.FileResponse(path)

    return serve
