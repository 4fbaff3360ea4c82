"""HAProxy in front of gateways, from the system's `haproxy`."""

import csv
import json

from testbed.processes import Port, Server, ServerError, find_program, http_get

HEALTH_CHECK_MS = 200


class HaProxy(Server):
    """HAProxy, 2.2 or newer, in front of gateways."""

    name = "HAProxy"

    def __init__(self, backends: list[tuple[int, int]]) -> None:
        """`backends`: for each gateway, the port of its API and the port of its operations listener."""
        super().__init__()
        self.stats_port = Port()
        self.backends = backends

    @property
    def url(self) -> str:
        """Return the URL for callers."""
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> list[int]:
        """Return the API ports of the gateways that get requests now."""
        states = self._states()
        return [api for api, _ in self.backends if states.get(str(api), "").startswith("UP")]

    def _prepare(self) -> None:
        for status, (sentence, code) in _HAPROXY_ERRORS.items():
            answer = json.dumps({"error": sentence, "code": code})
            (self.directory / f"{status}.json").write_text(answer)
        gateways = "\n".join(f"    server {api} 127.0.0.1:{api} check port {ops}" for api, ops in self.backends)
        (self.directory / "haproxy.cfg").write_text(
            _HAPROXY.format(port=self.port, stats_port=self.stats_port, interval=HEALTH_CHECK_MS, gateways=gateways)
        )

    def _command(self) -> list[str]:
        program = find_program("haproxy")
        if program is None:
            raise ServerError("HAProxy is missing: install the package haproxy (scripts/setup does).")
        return [str(program), "-db", "-f", str(self.directory / "haproxy.cfg")]

    def _answers(self) -> bool:
        # A gateway counts as up before its first check: wait until each has been checked.
        states = self._states()
        return len(states) == len(self.backends) and "" not in states.values()

    def _states(self) -> dict[str, str]:
        """Return the state of each gateway by its API port; "" before its first health check has ended."""
        answer = http_get(self.stats_port, "/;csv")
        if answer is None:
            return {}
        lines = answer[1].decode().removeprefix("# ").splitlines()
        rows = [row for row in csv.DictReader(lines) if row["pxname"] == "gateways" and row["svname"].isdecimal()]
        return {row["svname"]: "" if row["check_status"] in ("", "INI") else row["status"] for row in rows}

    def close(self) -> None:
        """Kill it, remove its folder, and release its ports."""
        super().close()
        self.stats_port.release()


_HAPROXY_ERRORS = {
    502: ("the gateway ended before it answered", "outcome_unknown"),
    503: ("no gateway can take the request now", "overloaded"),
    504: ("the gateway did not answer in time", "outcome_unknown"),
}
_HAPROXY = """\
global
    log stdout format raw local0
    # Two descriptors each: within the hard limit of any system.
    maxconn 2000

defaults
    mode http
    timeout connect 1s
    timeout client 60s
    # Above every deadline of the gateway, which answers 504 itself, with what it knows.
    timeout server 60s
    timeout http-request 15s
    timeout http-keep-alive 75s
    timeout check 1s
    # 503: no gateway took the request, so none of it was queued. 502, 504: a gateway took it, and then ended or
    # fell silent.
    http-error status 503 content-type application/json file 503.json hdr Retry-After 1
    http-error status 502 content-type application/json file 502.json
    http-error status 504 content-type application/json file 504.json

frontend api
    bind 127.0.0.1:{port}
    log global
    option httplog
    default_backend gateways

backend gateways
    # The log says which gateway went up or down.
    log global
    # Requests carry 1 to 1,000 messages: round robin would be unfair.
    balance leastconn
    option httpchk GET /readyz
    http-check expect status 200
    default-server inter {interval}ms fall 2 rise 1
    # A POST is sent again, to another gateway, only if the connection failed: then no gateway has seen it. It is not
    # repeated after an empty or missing answer, because the batch may be queued already. The caller decides about a
    # repeat, with an Idempotency-Key.
    retries 2
    retry-on conn-failure
    option redispatch 1
{gateways}

listen stats
    bind 127.0.0.1:{stats_port}
    stats enable
    stats uri /
"""
