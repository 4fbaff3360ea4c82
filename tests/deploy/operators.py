"""The fields of RabbitMQ's operators that the manifests use, with their types; any other field is an error.

Source: the published resource definitions (rabbitmq.com/v1beta1) of cluster-operator and messaging-topology-operator,
which no Python package contains. Enumerations are those of the definitions.
"""

from typing import Any, Literal

import msgspec


class Strict(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A structure in which a misspelt field is an error."""


class Reference(Strict):
    name: str


class Exchange(Strict):
    name: str
    rabbitmq_cluster_reference: Reference
    type: Literal["direct", "fanout", "topic", "headers"]
    durable: bool


class Queue(Strict):
    name: str
    rabbitmq_cluster_reference: Reference
    type: Literal["quorum", "classic", "stream"]
    durable: bool
    arguments: dict[str, Any] = {}


class Binding(Strict):
    rabbitmq_cluster_reference: Reference
    source: str
    destination: str
    destination_type: Literal["exchange", "queue"]
    routing_key: str


class Policy(Strict):
    name: str
    rabbitmq_cluster_reference: Reference
    pattern: str
    apply_to: Literal["queues", "classic_queues", "quorum_queues", "streams", "exchanges", "all"]
    definition: dict[str, Any]


class User(Strict):
    rabbitmq_cluster_reference: Reference
    tags: list[Literal["management", "policymaker", "monitoring", "administrator"]] = []


class Permissions(Strict):
    configure: str
    write: str
    read: str


class Permission(Strict):
    rabbitmq_cluster_reference: Reference
    vhost: str
    user_reference: Reference
    permissions: Permissions


class Persistence(Strict):
    storage: str


class Tls(Strict):
    secret_name: str


class Configuration(Strict):
    additional_config: str


class RabbitmqCluster(Strict):
    replicas: int
    persistence: Persistence
    resources: dict[str, dict[str, str]]
    tls: Tls
    rabbitmq: Configuration
    affinity: dict[str, Any]


SPECIFICATIONS: dict[str, type[Strict]] = {
    kind.__name__: kind for kind in (Exchange, Queue, Binding, Policy, User, Permission, RabbitmqCluster)
}
