"""An incident, played on real servers: the consumers stop, a backlog grows, and SMS become dead letters.

Prometheus scrapes the gateway and evaluates the rules of deploy/prometheus, the reference consumer consumes. Time runs
SPEED times faster: all durations of the rules, the gateway's questions and the consumer's age limit are divided by it.

    python -m tests.integration.incident --plot docs/incident.svg

Exit status 1 if an alert or a line of `status` was not what it should be.
"""

import argparse
import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aio_pika
import msgspec

from examples.consumer.consumer import Consumer
from examples.consumer.settings import Settings as ConsumerSettings
from gateway.amqp import depths
from gateway.cli.admin import open_admin
from testbed import Servers
from testbed.processes import Server, ServerError, find_program, http_get
from tests.support.callers import make_caller
from tests.support.gateways import GatewayUnderTest, default_settings, open_gateway, run_gateway

ROOT = Path(__file__).parents[2]
SPEED = 15
SMS_A_SECOND = 20  # 80 a minute of the incident's time
NAMES = {"amqp_exchange": "sms.outbound", "amqp_queue": "sms.outbound"}
# Minutes of the incident's time.
STOPPED_AT, STATUS_AT, STARTED_AT, LOOKED_AT, PURGED_AT, ENDS_AT = 10, 38, 45, 58, 62, 75
EXPECTED = ["GatewayQueueUnread", "GatewayBacklogOld", "GatewayDeadLetters", "GatewayDeadLettersRising"]
COMMON_LABELS = ("__name__", "job", "instance")
UNITS = {"s": 1, "m": 60, "h": 3600}

Points = list[tuple[float, float]]  # minute, value


class Prometheus(Server):
    """Prometheus, with the project's rules at SPEED."""

    name = "Prometheus"

    def __init__(self, ops_url: str) -> None:
        super().__init__()
        self._ops_url = ops_url

    @property
    def url(self) -> str:
        """Return the URL of its API."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        rules = faster((ROOT / "deploy/prometheus/alerts.yaml").read_text())
        (self.directory / "alerts.yaml").write_text(rules)
        config = (ROOT / "deploy/prometheus/prometheus.yml").read_text().replace("127.0.0.1:9090", self._ops_url[7:])
        (self.directory / "prometheus.yml").write_text(config.replace("15s", f"{15 / SPEED:g}s"))

    def _command(self) -> list[str]:
        program = find_program("prometheus")
        if program is None:
            raise ServerError("Prometheus is missing: install the package prometheus (scripts/setup does).")
        files = [f"--config.file={self.directory}/prometheus.yml", f"--storage.tsdb.path={self.directory}/data"]
        return [str(program), *files, f"--web.listen-address=127.0.0.1:{self.port}"]

    def _answers(self) -> bool:
        answer = http_get(self.port, "/-/ready")
        return answer is not None and answer[0] == 200


def faster(rules: str) -> str:
    """Return rules with all durations divided by SPEED, also the numbers of seconds in expressions."""

    def divided(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) * UNITS[match[3]] / SPEED:g}s"

    rules = re.sub(r"(\[|for: |offset )(\d+)([smh])\b", divided, rules)
    return rules.replace("/ 600", f"/ {600 / SPEED:g}").replace("1800 *", f"{1800 / SPEED:g} *")


class Play:
    """The servers, the clock and what was seen."""

    def __init__(self, servers: Servers, gateway: GatewayUnderTest, prometheus: Prometheus) -> None:
        self.servers = servers
        self.gateway = gateway
        self.prometheus = prometheus
        self.began = time.time()
        self.wrong: list[str] = []
        self.statuses: list[str] = []
        self.events: dict[str, float] = {}  # minutes

    @property
    def minute(self) -> float:
        """The minute of the incident's time."""
        return (time.time() - self.began) / 60 * SPEED

    async def until(self, minute: float) -> None:
        """Send SMS until this minute."""
        while self.minute < minute:
            begun = time.monotonic()
            await self.gateway.send([self.gateway.message()] * SMS_A_SECOND)
            await asyncio.sleep(max(0.0, 1.0 - (time.monotonic() - begun)))

    @asynccontextmanager
    async def consuming(self) -> AsyncIterator[None]:
        """Run the reference consumer, with its age limit at SPEED."""
        settings = ConsumerSettings(
            database_url=self.servers.database_url, amqp_url=self.servers.amqp_url, max_age_s=1800 / SPEED, prefetch=20
        )
        consumer = Consumer(settings)
        running = asyncio.create_task(consumer.run())
        try:
            yield
        finally:
            consumer.stop()
            await running

    def note(self, event: str) -> None:
        """Keep the minute of an event."""
        self.events[event] = self.minute

    async def status(self, expected: str) -> None:
        """Run `status`, and keep its output. `expected` is a pattern for its problems; "" for none."""
        settings = self.gateway.runtime.settings
        environment = {
            "GATEWAY_DATABASE_URL": settings.database_url,
            "GATEWAY_AMQP_URL": settings.amqp_url,
        }
        done = await asyncio.to_thread(
            run_gateway, "status", "--gateway", self.gateway.ops_url, environment=environment
        )
        output = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", done.stdout)
        shown = output.partition("\nsettings\n")[0] + "\n" + re.split(r"\n\n(?=(?:no )?problems)", output)[-1]
        self.statuses.append(f"minute {self.minute:.0f}, exit status {done.returncode}\n{shown}")
        problems = output.rpartition("problems\n")[2]
        if done.returncode != bool(expected) or not re.search(expected, problems):
            self.wrong.append(f"status at minute {self.minute:.0f}: {problems!r}, exit status {done.returncode}")

    async def query(self, expression: str, *, step_s: float = 1.0) -> dict[str, Points]:
        """Return the series of an expression over the whole incident, by their labels."""
        asked = {"query": expression, "start": str(self.began), "end": str(time.time()), "step": str(step_s)}
        async with self.gateway.session.get(f"{self.prometheus.url}/api/v1/query_range", params=asked) as answer:
            found = msgspec.json.decode(await answer.read())
        if found["status"] != "success":
            self.wrong.append(f"{expression}: {found}")
            return {}
        return {
            ", ".join(value for name, value in series["metric"].items() if name not in COMMON_LABELS): [
                ((at - self.began) / 60 * SPEED, float(value)) for at, value in series["values"]
            ]
            for series in found["data"]["result"]
        }


async def play(plot: Path | None) -> int:
    """Play the incident. Return 1 if something was not as expected."""
    depths.ASK_EVERY_S, depths.KNOWN_FOR_S = 15 / SPEED, 60 / SPEED
    with Servers(fsync=False) as servers:
        done = run_gateway("migrate", database_url=servers.database_url)
        if done.returncode:
            raise ServerError(done.stderr)
        async with open_gateway(default_settings(servers, **NAMES)) as gateway:
            await gateway.wait_until_ready()
            async with open_admin(servers.database_url) as admin:
                gateway.caller = await make_caller(admin)
            with Prometheus(gateway.ops_url) as prometheus:
                played = Play(servers, gateway, prometheus)
                await script(played)
                return await report(played, plot)


async def script(played: Play) -> None:
    """Stop the consumers, let SMS become too old, start the consumers, and discard the dead letters."""
    async with played.consuming():
        await played.until(STOPPED_AT)
        await played.status("")
    played.note("consumer stopped")
    await played.until(STATUS_AT)
    await played.status("queue sms.outbound: no consumer reads its messages")
    await played.until(STARTED_AT)
    played.note("started")
    async with played.consuming():
        await played.until(LOOKED_AT)
        await played.status(r"queue sms.outbound.dead: dead letters \(")
        await played.until(PURGED_AT)
        connection = await aio_pika.connect(played.servers.amqp_url)
        async with connection, connection.channel() as channel:
            await (await channel.get_queue("sms.outbound.dead", ensure=False)).purge()
        played.note("dead letters discarded")
        await played.until(ENDS_AT)
        await played.status("")


async def report(played: Play, plot: Path | None) -> int:
    """Print what was seen, and draw it."""
    alerts = await played.query('ALERTS{alertstate="firing"}')
    firing = {name.partition(",")[0]: points for name, points in alerts.items()}
    for name, points in sorted(firing.items(), key=lambda item: item[1]):
        print(f"{name}: minutes {points[0][0]:.0f} to {points[-1][0]:.0f}")
    if sorted(firing) != sorted(EXPECTED):
        played.wrong.append(f"alerts: {sorted(firing)} instead of {sorted(EXPECTED)}")
    panels = await dashboard(played)
    print("\n".join(["", *played.statuses]))
    if plot is not None:
        await asyncio.to_thread(plot.write_text, picture(panels, firing, played))
    for line in played.wrong:
        print(f"WRONG: {line}")
    return 1 if played.wrong else 0


async def dashboard(played: Play) -> dict[str, dict[str, Points]]:
    """Evaluate every panel of the dashboard, and return the series of the row about queues, by title and legend."""
    found: dict[str, dict[str, Points]] = {}
    row = ""
    for panel in msgspec.json.decode((ROOT / "deploy/grafana/gateway.json").read_bytes())["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$job", "sms-gateway").replace("$instance", ".*")
            expression = expression.replace("$__rate_interval", f"{60 / SPEED:g}s").replace("3600", f"{3600 / SPEED:g}")
            series = await played.query(expression, step_s=2.0)
            if row == "Queues and consumers":
                legend = target["legendFormat"]
                known = found.setdefault(panel["title"], {})
                known |= {(labels if "{{" in legend else legend): points for labels, points in series.items()}
    return found


WIDTH, HEIGHT, LEFT, GAP, BAR = 640, 110, 40, 34, 16
COLOURS = ("#2563eb", "#e07b1a", "#12946a")


def picture(panels: dict[str, dict[str, Points]], firing: dict[str, Points], played: Play) -> str:
    """Return the panels and the alerts over time as an SVG file."""
    minutes = max(points[-1][0] for lines in panels.values() for points in lines.values())

    def x(minute: float) -> float:
        return LEFT + minute / minutes * WIDTH

    parts, top = [], 24.0
    for title, lines in panels.items():
        most = max((value for points in lines.values() for _, value in points), default=0.0) or 1.0
        scale = SPEED / 60 if title.startswith("Wait") else 1.0  # seconds to minutes of the incident's time
        label = f"{title}, 0 to {most * scale:,.0f}{' minutes' if scale != 1 else ''}"
        parts.append(_text(LEFT, top - 8, label))
        parts.append(f'<path d="M{LEFT} {top:.0f}v{HEIGHT}h{WIDTH}" fill="none" stroke="#6b7280"/>')
        if scale != 1:  # the limit of 30 minutes, in red as in the dashboard
            level = top + HEIGHT * (1 - 30 / (most * scale))
            parts.append(f'<path d="M{LEFT} {level:.0f}h{WIDTH}" stroke="#dc2626"/>')
        for number, (name, points) in enumerate(sorted(lines.items(), reverse=title.startswith("Messages"))):
            path = " ".join(f"{x(at):.0f},{top + HEIGHT * (1 - value / most):.0f}" for at, value in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="2"/>')
            parts.append(_text(LEFT + WIDTH - 130 * number, top - 8, name, COLOURS[number], "end"))
        top += HEIGHT + GAP
    parts.append(_text(LEFT, top - 8, "Alerts that fire"))
    for name, points in sorted(firing.items(), key=lambda item: item[1]):
        begin, end = x(points[0][0]), x(points[-1][0])
        parts.append(f'<rect x="{begin:.0f}" y="{top}" width="{end - begin:.0f}" height="{BAR - 4}" fill="#dc2626"/>')
        is_left = begin > LEFT + WIDTH / 2
        parts.append(_text(begin - 6 if is_left else end + 6, top + 10, name, anchor="end" if is_left else "start"))
        top += BAR
    for event, minute in played.events.items():
        parts.append(f'<path d="M{x(minute):.0f} 24V{top + 4:.0f}" stroke="#6b7280" stroke-dasharray="3 3"/>')
        parts.append(_text(x(minute), top + 18, f"{minute:.0f} min: {event}", anchor="middle"))
    size = f'viewBox="0 0 {WIDTH + 2 * LEFT} {top + 28:.0f}"'
    style = "<style>text{font:11px sans-serif}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, colour: str = "#6b7280", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}" text-anchor="{anchor}">{text}</text>'


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the queue panels and the alerts, as SVG")
    return asyncio.run(play(parser.parse_args().plot))


if __name__ == "__main__":
    sys.exit(main())
