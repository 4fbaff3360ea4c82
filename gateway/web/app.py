"""Routes and middlewares of the two listeners. Nothing else."""

from aiohttp import web

from gateway.ingest.wire import MAX_BODY_BYTES
from gateway.runtime import RUNTIME, Runtime
from gateway.web import api, metrics
from gateway.web import openapi as documents
from gateway.web import ops as health
from gateway.web.answers import answer_every_request
from gateway.web.bodies import expect_later


def make_app(runtime: Runtime) -> web.Application:
    """What callers reach."""
    app = web.Application(middlewares=[api.record_every_request, answer_every_request], client_max_size=MAX_BODY_BYTES)
    app[RUNTIME] = runtime
    app.router.add_post(api.SEND_BULK, api.send_bulk, expect_handler=expect_later)
    app.router.add_get(api.OPENAPI, documents.openapi, expect_handler=expect_later)
    app.router.add_route("*", "/{path:.*}", api.refuse_route, expect_handler=expect_later)
    return app


def make_ops_app(runtime: Runtime) -> web.Application:
    """What operators and their probes reach."""
    app = web.Application(middlewares=[answer_every_request])
    app[RUNTIME] = runtime
    app.router.add_get("/livez", health.live)
    app.router.add_get("/readyz", health.ready)
    documents.add_page(app)
    app.router.add_get("/metrics", metrics.show)
    return app
