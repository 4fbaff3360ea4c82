"""Liveness and readiness, for the operations listener.

Readiness stays shallow on purpose: were it to follow the broker or the database, their outage would take all replicas
out of the load balancer at once, and callers would get connection errors in place of an honest 503.
"""

from aiohttp import web

from gateway.runtime import RUNTIME


async def live(_request: web.Request) -> web.Response:
    """200 as long as the event loop turns."""
    return web.json_response({"status": "alive"})


async def ready(request: web.Request) -> web.Response:
    """200 once broker and database have been reached, until the drain begins; else 503 with what is missing."""
    missing = request.app[RUNTIME].not_ready_reasons()
    if missing:
        return web.json_response({"status": "not ready", "reasons": missing}, status=503)
    return web.json_response({"status": "ready"})
