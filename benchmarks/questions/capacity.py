"""The cores, nodes, queues and network that a rate needs, computed from measured costs.

Costs are proportional to the rate while no core is full. The headroom keeps cores below that point. Network counts
bodies only: HTTP, TCP and IP headers add a few percent to batches of 1,000.
"""

import math
from pathlib import Path

import msgspec

from benchmarks.drivers import publisher, traffic
from benchmarks.drivers.systems import BARE_PUBLISHER, GATEWAY
from benchmarks.questions.compare import FULL_BATCH, Comparison
from benchmarks.report import machine
from benchmarks.report.document import Cell, Report, Sentence, Table
from benchmarks.report.figures import short
from benchmarks.report.machine import Machine

FRAME_MAX = 131_072  # RabbitMQ's default
PLATFORM_RATE = 50e6 / 60  # messages a second: the vendor's published capacity


class CapacityError(Exception):
    """Raised for a file without the costs."""


class Costs(msgspec.Struct, frozen=True):
    """The measured costs of a message."""

    gateway_cpu_us: float = 0.0
    broker_cpu_us: float = 0.0
    database_cpu_us: float = 0.0
    queue_messages_per_s: float = 0.0  # rate of one queue with the bare publisher
    sms_per_message: int = 1
    source: str = ""
    machine: Machine | None = None


class Wanted(msgspec.Struct, frozen=True):
    """The rate to reach, and the machines to reach it on."""

    messages_per_s: float = PLATFORM_RATE
    headroom: float = 0.5  # share of each core that stays free, for peaks and for replicas being replaced
    cores_per_broker_node: int = 8
    copies: int = 3  # of each message, in a quorum queue with three members


class Capacity(msgspec.Struct):
    """The resources that the rate needs."""

    costs: Costs
    wanted: Wanted
    gateway_cores: float
    gateway_processes: int  # of one core each
    broker_cores: float
    broker_nodes: int
    queues: int
    database_cores: float
    network_in_gbit: float  # callers to gateways
    network_amqp_gbit: float  # gateways to the broker
    network_copies_gbit: float  # between the broker's nodes


def costs_in(file: Path) -> Costs:
    """Return the costs of full batches in a file of `compare --json`. Raises CapacityError."""
    try:
        comparison = msgspec.json.decode(file.read_bytes(), type=Comparison)
    except (OSError, msgspec.DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CapacityError(f"--from {file}: {reason}: write it with `scripts/bench compare --json {file}`") from None
    return _costs_of(comparison, str(file))


def _costs_of(comparison: Comparison, source: str) -> Costs:
    full = {one.system: one for one in comparison.summaries if one.batch == FULL_BATCH}
    if not {GATEWAY, BARE_PUBLISHER} <= full.keys():
        raise CapacityError(
            f"--from {source} has no valid runs of gateway and bare publisher with batches of {FULL_BATCH:,}"
        )
    gateway = full[GATEWAY]
    return Costs(
        gateway_cpu_us=gateway.server_cpu_us_per_message.median,
        broker_cpu_us=gateway.broker_cpu_us_per_message.median,
        database_cpu_us=gateway.database_cpu_us_per_message.median,
        queue_messages_per_s=full[BARE_PUBLISHER].messages_per_s.median,
        sms_per_message=comparison.options.messages_per_envelope,
        source=f"{source}: commit {comparison.machine.commit}, {comparison.machine.date}",
        machine=comparison.machine,
    )


def calculate(costs: Costs, wanted: Wanted) -> Capacity:
    """Compute the resources. Each further copy of a message is taken to cost the broker as much as the first one."""
    rate, usable = wanted.messages_per_s, 1 - wanted.headroom
    gateway_cores = rate * costs.gateway_cpu_us / 1e6
    broker_cores = rate * costs.broker_cpu_us * wanted.copies / 1e6
    amqp_gbit = rate * _amqp_bytes(costs.sms_per_message) * 8 / 1e9
    return Capacity(
        costs=costs,
        wanted=wanted,
        gateway_cores=gateway_cores,
        gateway_processes=math.ceil(gateway_cores / usable),
        broker_cores=broker_cores,
        broker_nodes=max(wanted.copies, math.ceil(broker_cores / usable / wanted.cores_per_broker_node)),
        queues=math.ceil(rate / usable / costs.queue_messages_per_s),
        database_cores=rate * costs.database_cpu_us / 1e6,
        network_in_gbit=rate * _http_bytes() * 8 / 1e9,
        network_amqp_gbit=amqp_gbit,
        network_copies_gbit=amqp_gbit * (wanted.copies - 1),
    )


def _http_bytes() -> float:
    """Return the bytes of a request body, per message."""
    ((body, _),) = traffic.request_bodies(1, FULL_BATCH, ["+18005551000"])
    return len(body) / FULL_BATCH


def _amqp_bytes(sms_per_message: int) -> float:
    """Return the bytes of the AMQP frames, per message."""
    plan = publisher.Plan("", "sms.outbound", [], FULL_BATCH, sms_per_message)
    return len(publisher.encode_batch(plan, "sms.outbound", FRAME_MAX)[0]) / FULL_BATCH


def report(capacity: Capacity) -> Report:
    """Return the resources as a table."""
    costs, wanted = capacity.costs, capacity.wanted
    free = f"{wanted.headroom:.0%} of each kept free"
    copies = f"{wanted.copies} copies"
    rows: list[list[Cell]] = [
        ["messages a second", f"{wanted.messages_per_s:,.0f}"],
        [f"gateway, at {short(costs.gateway_cpu_us)} µs a message", f"{capacity.gateway_cores:.1f} cores"],
        [f"gateway processes of one core, {free}", f"{capacity.gateway_processes}"],
        [
            f"broker, at {short(costs.broker_cpu_us)} µs a message and copy, {copies}",
            f"{capacity.broker_cores:.1f} cores",
        ],
        [f"broker nodes of {wanted.cores_per_broker_node} cores, {free}", f"{capacity.broker_nodes}"],
        [f"queues (shards) of {short(costs.queue_messages_per_s)} messages/s, {free}", f"{capacity.queues}"],
        [f"database, at {short(costs.database_cpu_us)} µs a message", f"{capacity.database_cores:.1f} cores"],
        ["network, callers to gateways", f"{capacity.network_in_gbit:.2f} Gbit/s"],
        ["network, gateways to broker", f"{capacity.network_amqp_gbit:.2f} Gbit/s"],
        ["network, between broker nodes", f"{capacity.network_copies_gbit:.2f} Gbit/s"],
    ]
    return Report(
        f"Resources for {wanted.messages_per_s * 60:,.0f} messages a minute",
        costs.machine or machine.describe(),
        [*([Sentence(costs.source)] if costs.source else []), Table("Resources", ["part", "needed"], rows)],
    )
