"""The fields of operators' resources that the manifests use, with their types; any other field is an error.

Source: the published resource definitions of cluster-operator and messaging-topology-operator (rabbitmq.com/v1beta1),
prometheus-operator (monitoring.coreos.com/v1) and cert-manager (cert-manager.io/v1), which no Python package contains.
Enumerations are those of the definitions.
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
    image: str
    replicas: int
    persistence: Persistence
    resources: dict[str, dict[str, str]]
    tls: Tls
    rabbitmq: Configuration
    affinity: dict[str, Any]


class Selector(Strict):
    match_labels: dict[str, str]


class PodMetricsEndpoint(Strict):
    port: str
    path: str
    interval: str


class PodMonitor(Strict):
    job_label: str
    selector: Selector
    pod_metrics_endpoints: list[PodMetricsEndpoint]


class Rule(Strict):
    expr: str
    record: str | msgspec.UnsetType = msgspec.UNSET
    alert: str | msgspec.UnsetType = msgspec.UNSET
    # `for` is a keyword of Python.
    duration: str | msgspec.UnsetType = msgspec.field(name="for", default=msgspec.UNSET)
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class RuleGroup(Strict):
    name: str
    rules: list[Rule]


class PrometheusRule(Strict):
    groups: list[RuleGroup]


class Issuer(Strict):
    kind: Literal["Issuer", "ClusterIssuer"]
    name: str


class Certificate(Strict):
    secret_name: str
    issuer_ref: Issuer
    dns_names: list[str]


_RABBITMQ = (Exchange, Queue, Binding, Policy, User, Permission, RabbitmqCluster)
_GROUPS: dict[str, tuple[type[Strict], ...]] = {
    "rabbitmq.com/v1beta1": _RABBITMQ,
    "monitoring.coreos.com/v1": (PodMonitor, PrometheusRule),
    "cert-manager.io/v1": (Certificate,),
}
# By apiVersion and kind.
SPECIFICATIONS: dict[tuple[str, str], type[Strict]] = {
    (version, kind.__name__): kind for version, kinds in _GROUPS.items() for kind in kinds
}
