"""The operations listener: liveness and readiness, metrics, and the page of the OpenAPI document."""

from aiohttp import web

from gateway.config import Settings
from gateway.runtime import RUNTIME, Runtime
from gateway.web import metrics, openapi
from gateway.web.answers import answer_every_request, refuse_unhandled
from gateway.web.connections import BoundedRunner
from gateway.web.sockets import Limits

CONNECTIONS = 64  # for probes and a few operators
DRAIN_TIMEOUT_S = 1.0  # for probes and scrapes; the API has been drained by then


def make_ops_runner(app: web.Application, settings: Settings) -> BoundedRunner:
    """Return the runner of an application for operators; it listens nowhere yet."""
    limits = Limits(settings.header_timeout_s, settings.answer_timeout_s, CONNECTIONS)
    return BoundedRunner(app, limits, refuse_unhandled, drain_timeout_s=DRAIN_TIMEOUT_S)


def make_ops_app(runtime: Runtime) -> web.Application:
    """Return the application for operators and their probes."""
    app = web.Application(middlewares=[answer_every_request])
    app[RUNTIME] = runtime
    app.router.add_get("/livez", live)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/metrics", metrics.show)
    openapi.add_page(app)
    return app


async def live(_request: web.Request) -> web.Response:
    """Answer 200. A process whose event loop is stuck does not answer."""
    return web.json_response({"status": "alive"})


async def ready(request: web.Request) -> web.Response:
    """Answer 200 from the first connection to broker and database until the drain; otherwise 503 with the reasons."""
    reasons = request.app[RUNTIME].not_ready_reasons()
    if reasons:
        return web.json_response({"status": "not ready", "reasons": reasons}, status=503)
    return web.json_response({"status": "ready"})
