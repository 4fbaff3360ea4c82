"""A picture of the dashboard without Grafana: its own panels and queries, answered by a real Prometheus.

    scripts/dashboard                        writes docs/dashboard.svg
    scripts/dashboard --seconds 60 --to x.svg

A gateway of two workers is under load; in the second third a memory alarm blocks the broker for a while, in the last
the database hangs. Grafana's layout, units and legends are kept as far as a plain picture needs them.
"""

import argparse
import asyncio
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from html import escape
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import aiohttp
import msgspec

from benchmarks.drivers.backends import BROKER_MEMORY, Backends, open_backends
from testbed.servers import Gateway, Port, Server

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy/grafana/gateway.json"
SCRAPE_S = 2
FAULT_SHARE = 0.12  # of the run, each of the two
CALLERS, BATCH, PAUSE_S = 12, 100, 0.15

COLUMN, ROW_HEIGHT, GAP = 60, 30, 8  # pixels of Grafana's grid of 24 columns
COLOURS = ("#2563eb", "#e07b1a", "#12946a", "#b4367e", "#8a8f98", "#7c3aed", "#ca8a04", "#0e7490")
INK, PALE, BACK = "#1f2937", "#6b7280", "#ffffff"
SIZES = {"text": 11, "title": 12, "stat": 30}


class Series(NamedTuple):
    """One line of a panel."""

    name: str
    points: Sequence[tuple[float, float]]


class Prometheus(Server):
    """A private Prometheus that scrapes one gateway, with the rules of deploy/prometheus. Debian's package."""

    name = "Prometheus"

    def __init__(self, target: Port) -> None:
        super().__init__()
        self._target = target

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        targets = f"[{{targets: ['127.0.0.1:{self._target}']}}]"
        (self.directory / "prometheus.yml").write_text(
            f"global: {{scrape_interval: {SCRAPE_S}s, evaluation_interval: {SCRAPE_S}s}}\n"
            f"rule_files: ['{ROOT}/deploy/prometheus/alerts.yaml']\n"
            f"scrape_configs: [{{job_name: sms-gateway, static_configs: {targets}}}]\n"
        )

    def _command(self) -> list[str]:
        program = shutil.which("prometheus")
        if program is None:
            raise SystemExit("dashboard: Prometheus is missing: apt-get install prometheus")
        configuration, data = self.directory / "prometheus.yml", self.directory / "data"
        listen = f"--web.listen-address=127.0.0.1:{self.port}"
        return [program, f"--config.file={configuration}", f"--storage.tsdb.path={data}", listen]

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port.number, timeout=1.0)
        try:
            connection.request("GET", "/-/ready")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def ask(self, expression: str, begin: float, end: float) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels and points of each series. Raises ValueError when Prometheus does not take the query."""
        query = urlencode({"query": expression, "start": begin, "end": end, "step": SCRAPE_S})
        connection = HTTPConnection("127.0.0.1", self.port.number, timeout=10.0)
        try:
            connection.request("GET", f"/api/v1/query_range?{query}")
            answer = msgspec.json.decode(connection.getresponse().read())
        finally:
            connection.close()
        if answer["status"] != "success":
            raise ValueError(f"{expression}: {answer.get('error')}")
        return [
            (one["metric"], [(at, float(value)) for at, value in one["values"] if value != "NaN"])
            for one in answer["data"]["result"]
        ]


class TwoWorkers(Gateway):
    """The gateway as two processes."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--workers", "2"]


async def call_until(end: float, url: str, stand: Backends) -> None:
    """Callers who send again and again; one message in forty is bad."""
    good = {"to": "+14155551234", "list_number": stand.list_numbers[0], "body": "Your code is 1234. Ref: {{messageId}}"}
    messages = [good if number % 40 else {**good, "to": "4155551234"} for number in range(BATCH)]
    body, headers = (
        msgspec.json.encode({"messages": messages}),
        {"X-Api-Key": stand.key, "Content-Type": "application/json"},
    )

    async def call() -> None:
        while time.time() < end:
            async with session.post(f"{url}/api/v2/send/bulk", data=body, headers=headers) as response:
                await response.read()
            await asyncio.sleep(PAUSE_S)

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(call())


async def hurt(stand: Backends, begin: float, seconds: float) -> None:
    """A memory alarm, and a database that hangs."""
    rabbitmq, postgres = stand.servers.rabbitmq, stand.servers.postgres
    if rabbitmq is None or postgres is None:
        raise SystemExit("dashboard: it hurts its servers, and needs private ones: unset GATEWAY_*_URL")
    await asyncio.sleep(begin + 0.4 * seconds - time.time())
    await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
    await asyncio.sleep(FAULT_SHARE * seconds)
    await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "absolute", BROKER_MEMORY)
    await asyncio.sleep(max(0.0, begin + 0.72 * seconds - time.time()))
    postgres.pause()
    await asyncio.sleep(FAULT_SHARE * seconds)
    postgres.resume()


def run(seconds: float) -> tuple[dict[str, Any], dict[int, list[Series]]]:
    """The dashboard, and what each of its panels showed."""
    dashboard = msgspec.json.decode(DASHBOARD.read_bytes())
    with open_backends() as stand, stand.names("quorum", declare=False) as names:
        environment = stand.servers.environment() | names.settings()
        with TwoWorkers(environment) as gateway, Prometheus(gateway.ops_port) as prometheus:
            begin = time.time()

            async def under_load() -> None:
                await asyncio.gather(call_until(begin + seconds, gateway.url, stand), hurt(stand, begin, seconds))

            asyncio.run(under_load())
            shown = {panel["id"]: read(panel, prometheus, begin + 8, begin + seconds) for panel in dashboard["panels"]}
    return dashboard, shown


def read(panel: Mapping[str, Any], prometheus: Prometheus, begin: float, end: float) -> list[Series]:
    """What a panel's queries answer, under the names that its legend gives them."""
    found = []
    for target in panel.get("targets", []):
        expression = target["expr"]
        for variable, value in {"$job": "sms-gateway", "$instance": ".*", "$__rate_interval": "8s"}.items():
            expression = expression.replace(variable, value)
        for labels, points in prometheus.ask(expression, begin, end):
            name = target["legendFormat"]
            for label in ("outcome", "status", "code", "stage", "state", "reason", "worker"):
                name = name.replace("{{" + label + "}}", labels.get(label, ""))
            found.append(Series(name.replace("{{instance}} ", ""), [(at - begin, value) for at, value in points]))
    return found


def draw(dashboard: Mapping[str, Any], shown: Mapping[int, Sequence[Series]]) -> str:
    """The page as one SVG."""
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * ROW_HEIGHT + GAP
    span = max((at for lines in shown.values() for line in lines for at, _ in line.points), default=1.0)
    parts = [f'<rect width="100%" height="100%" fill="{BACK}"/>']
    for panel in panels:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + GAP / 2, place["y"] * ROW_HEIGHT + GAP / 2
        width, tall = place["w"] * COLUMN - GAP, place["h"] * ROW_HEIGHT - GAP
        if panel["type"] == "row":
            parts.append(text(x + 4, y + 16, panel["title"], size="title", bold=True))
            continue
        unit = panel["fieldConfig"]["defaults"]["unit"]
        inside = _stat if panel["type"] == "stat" else _plot
        is_stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
        parts += [
            f'<g transform="translate({x:.0f} {y:.0f})">',
            f'<rect width="{width}" height="{tall}" rx="4" fill="none" stroke="#d1d5db"/>',
            text(8, 17, panel["title"], size="title", bold=True),
            *inside(_stacked(shown[panel["id"]]) if is_stacked else shown[panel["id"]], unit, width, tall, span),
            "</g>",
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {24 * COLUMN} {height}" font-family="sans-serif">'
        f"{''.join(parts)}</svg>\n"
    )


def _stacked(lines: Sequence[Series]) -> list[Series]:
    """Each line on top of those before it."""
    sums: dict[float, float] = {}
    stacked = []
    for line in lines:
        for at, value in line.points:
            sums[at] = sums.get(at, 0.0) + value
        stacked.append(Series(line.name, [(at, sums[at]) for at, _ in line.points]))
    return stacked


def _stat(lines: Sequence[Series], unit: str, width: float, tall: float, span: float) -> list[str]:
    """The last value, large, before its course."""
    if not lines or not lines[0].points:
        return [text(width / 2, tall / 2 + 14, "no data", size="title", anchor="middle")]
    points = lines[0].points
    highest = max(value for _, value in points) or 1.0
    path = " ".join(f"{8 + at / span * (width - 16):.1f},{tall - 6 - value / highest * 26:.1f}" for at, value in points)
    return [
        f'<polyline points="{path}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5" opacity="0.6"/>',
        text(width / 2, tall / 2 + 14, _in_unit(points[-1][1], unit), size="stat", anchor="middle", bold=True),
    ]


def _plot(lines: Sequence[Series], unit: str, width: float, tall: float, span: float) -> list[str]:
    left, right, top, bottom = 56.0, width - 14, 28.0, tall - 46
    highest = _round_up(max((value for line in lines for _, value in line.points), default=1.0))
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(text(left - 5, y + 4, _in_unit(share * highest, unit), anchor="end"))
    parts += [
        text(left + at / span * (right - left), bottom + 14, f"{at} s", anchor="middle")
        for at in range(0, int(span) + 1, 30)
    ]
    x = left
    y = tall - 20.0
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        for stretch in _stretches(line.points):
            path = " ".join(
                f"{left + at / span * (right - left):.1f},{bottom - value / highest * (bottom - top):.1f}"
                for at, value in stretch
            )
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        room = 22 + 7 * len(line.name)
        if x + room > right:
            x, y = left, y + 13
        parts.append(f'<rect x="{x:.0f}" y="{y - 8:.0f}" width="9" height="9" fill="{colour}"/>')
        parts.append(text(x + 13, y, line.name))
        x += room
    return parts


def _stretches(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The points, parted where some are missing."""
    found: list[list[tuple[float, float]]] = []
    for at, value in points:
        if not found or at - found[-1][-1][0] > 1.5 * SCRAPE_S:
            found.append([])
        found[-1].append((at, value))
    return found


def _round_up(value: float) -> float:
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= value * 0.999)


def _in_unit(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or not value else f"{1000 * value:.3g} ms"
    return f"{value / 1000:.3g} k" if value >= 10_000 else f"{value:.4g}"


def text(x: float, y: float, content: str, *, size: str = "text", anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    colour = INK if bold else PALE
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{SIZES[size]}" fill="{colour}" '
        f'text-anchor="{anchor}"{weight}>{escape(content)}</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/dashboard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="of load")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/dashboard.svg")
    options = parser.parse_args()
    dashboard, shown = run(options.seconds)
    options.to.write_text(draw(dashboard, shown), encoding="utf-8")
    print(f"wrote {options.to}")


if __name__ == "__main__":
    main()
