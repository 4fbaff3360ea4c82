"""What do 50 million messages a minute take? From measured costs to cores, nodes, queues and network. No IO, no clock.

Costs grow in a straight line with the rate as long as no core is full, which is what the headroom keeps them from.
Network is what the bodies take; HTTP, TCP and IP headers add a few percent to batches of 1,000.
"""

import math

import msgspec

from benchmarks import publisher, traffic
from benchmarks.compare import FULL_BATCH, Comparison
from benchmarks.machine import Machine
from benchmarks.runs import GATEWAY, LIMIT

FRAME_MAX = 131_072  # RabbitMQ's default
PLATFORM_RATE = 50e6 / 60  # messages a second: the vendor's published capacity


class Costs(msgspec.Struct, frozen=True):
    """What was measured, per message."""

    gateway_cpu_us: float = 0.0
    broker_cpu_us: float = 0.0
    database_cpu_us: float = 0.0
    queue_messages_per_s: float = 0.0  # what one queue took from the bare publisher
    sms_per_message: int = 1
    source: str = ""
    machine: Machine | None = None


class Wanted(msgspec.Struct, frozen=True):
    """What it is to carry, and on what."""

    messages_per_s: float = PLATFORM_RATE
    headroom: float = 0.5  # of each core stays free: for peaks, and for replicas that are being replaced
    cores_per_broker_node: int = 8
    copies: int = 3  # of each message: a quorum queue with three members


class Capacity(msgspec.Struct):
    """What it takes."""

    costs: Costs
    wanted: Wanted
    gateway_cores: float
    gateway_processes: int  # a core each
    broker_cores: float
    broker_nodes: int
    queues: int
    database_cores: float
    network_in_gbit: float  # callers to gateways
    network_amqp_gbit: float  # gateways to the broker
    network_copies_gbit: float  # between the broker's nodes


def costs_of(comparison: Comparison, source: str) -> Costs:
    """The costs of full batches. Raises ValueError when the comparison has none."""
    full = {one.system: one for one in comparison.summaries if one.batch == FULL_BATCH}
    if not {GATEWAY, LIMIT} <= full.keys():
        raise ValueError(f"{source} has no valid runs of gateway and limit with batches of {FULL_BATCH:,}")
    gateway = full[GATEWAY]
    return Costs(
        gateway_cpu_us=gateway.server_cpu_us_per_message.median,
        broker_cpu_us=gateway.broker_cpu_us_per_message.median,
        database_cpu_us=gateway.database_cpu_us_per_message.median,
        queue_messages_per_s=full[LIMIT].messages_per_s.median,
        sms_per_message=comparison.options.messages_per_envelope,
        source=f"{source}: commit {comparison.machine.commit}, {comparison.machine.date}",
        machine=comparison.machine,
    )


def calculate(costs: Costs, wanted: Wanted) -> Capacity:
    """A copy costs a node at most what the one copy of the measurement cost: so copies multiply the broker's work."""
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
    """Of a request body, per message."""
    ((body, _),) = traffic.request_bodies(1, FULL_BATCH, ["+18005551000"])
    return len(body) / FULL_BATCH


def _amqp_bytes(sms_per_message: int) -> float:
    """Of the frames, per message."""
    plan = publisher.Plan("", "sms.outbound", [], FULL_BATCH, sms_per_message)
    return len(publisher.encode_batch(plan, "sms.outbound", FRAME_MAX)[0]) / FULL_BATCH
