"""Kubernetes manifests: valid for Kubernetes, the operators and the gateway, and consistent with one another."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import msgspec
import pytest
import yaml

from gateway import __version__, config
from gateway.config import Settings
from gateway.ingest.wire import MAX_BODY_BYTES
from tests.deploy.manifests import (
    EXIT_MARGIN_S,
    KUBERNETES,
    Object,
    containers,
    environment_of,
    gateway_of,
    only,
    probes_of,
    render,
)
from tests.deploy.operators import SPECIFICATIONS
from tests.support.documents import code_blocks, row_of_versions

FOLDERS = ["base", "migrate", "migrate-example", "rabbitmq", "example", "sidecar-example"]
# The oldest version with sidecars, and the newest one with schemas.
KUBERNETES_VERSIONS = ["1.29", "1.37"]
ALERTS = KUBERNETES.parent / "prometheus" / "alerts.yaml"
GUIDE = KUBERNETES.parents[1] / "docs" / "kubernetes.md"


def cases(*kinds: str) -> list[Any]:
    """Return all objects of all folders, or those of some kinds, each as a test case."""
    return [
        pytest.param(one, id=f"{folder}-{one['kind']}-{one['metadata']['name']}")
        for folder in FOLDERS
        for one in render(folder)
        if not kinds or one["kind"] in kinds
    ]


GATEWAYS = ["base", "example", "sidecar-example"]  # the folders with a Deployment of the gateway


def settings_of(folder: str | Path) -> Settings:
    return config.load(environment_of(folder))


def check_schema(one: Object, version: str) -> None:
    """Raise unless an object follows its schema; unknown fields are errors."""
    if specification := SPECIFICATIONS.get((one["apiVersion"], one["kind"])):
        msgspec.convert(one["spec"], specification)
    else:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("one", cases())
def test_an_object_follows_its_schema(one: Object, version: str) -> None:
    check_schema(one, version)


def test_a_misspelt_field_would_be_seen() -> None:
    deployment = only(render("base"), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSIONS[-1], strict=True)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"vhost": "/", "user": "typo"}, SPECIFICATIONS["rabbitmq.com/v1beta1", "Permission"])


@pytest.mark.parametrize("workload", cases("Deployment", "Job"))
def test_a_pod_keeps_to_the_restricted_security_standard_and_writes_nowhere(workload: Object) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in containers(workload):
        security = pod["securityContext"] | container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
    assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]


@pytest.mark.parametrize("workload", cases("Deployment", "Job"))
def test_the_gateway_is_named_by_its_version_and_not_confused_by_service_links(workload: Object) -> None:
    container = gateway_of(workload)
    assert container["image"].endswith(f"sms-gateway:{__version__}")
    assert workload["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("folder", GATEWAYS)
def test_every_variable_is_a_setting(folder: str) -> None:
    assert config.unknown_variables(environment_of(folder)) == []
    assert settings_of(folder).amqp_topology == "check"


@pytest.mark.parametrize("folder", ["base", "example"])
def test_probes_ask_paths_and_ports_that_there_are(folder: str) -> None:
    settings = settings_of(folder)
    container = gateway_of(only(render(folder), "Deployment"))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = {name: value["httpGet"] for name, value in probes_of(container).items()}
    assert {"startupProbe", "livenessProbe"} <= set(probes)
    assert {ports[probe["port"]] for probe in probes.values()} == {settings.ops_port}
    assert settings.ops_host == "0.0.0.0"  # noqa: S104 - the kubelet asks the pod's address
    assert probes["livenessProbe"]["path"] == "/livez"
    # tests/deploy/test_pod.py requests them from a process.
    assert {probe["path"] for probe in probes.values()} == {"/livez", "/readyz"}
    assert set(ports.values()) <= {settings.api_port, settings.ops_port}


@pytest.mark.parametrize("folder", GATEWAYS)
def test_a_pod_has_the_time_to_drain(folder: str) -> None:
    settings = settings_of(folder)
    pod = only(render(folder), "Deployment")["spec"]["template"]["spec"]
    hooks = [container.get("lifecycle", {}).get("preStop", {}) for container in pod["containers"]]
    hook_s = max(hook.get("sleep", {}).get("seconds", 0) for hook in hooks)
    drain_s = hook_s + settings.drain_delay_s + settings.drain_timeout_s
    assert pod["terminationGracePeriodSeconds"] >= drain_s + EXIT_MARGIN_S


def test_the_sidecar_is_one_and_outlives_the_application() -> None:
    deployment = only(render("sidecar-example"), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (sidecar,) = pod["initContainers"]
    settings = settings_of("sidecar-example")
    assert sidecar["restartPolicy"] == "Always"
    probes = probes_of(sidecar)
    assert set(probes) == {"startupProbe", "livenessProbe"}
    # tests/deploy/test_pod.py runs these commands.
    assert "'/readyz'" in probes["startupProbe"]["exec"]["command"][-1]
    assert "'/livez'" in probes["livenessProbe"]["exec"]["command"][-1]
    # The application's pods have no network policy of ours: nothing of the sidecar may listen outside the pod.
    assert (settings.api_host, settings.ops_host) == ("127.0.0.1", "127.0.0.1")
    assert "ports" not in sidecar
    (url,) = [one["value"] for one in pod["containers"][0]["env"]]
    assert url == f"http://{settings.api_host}:{settings.api_port}/api/v2/send/bulk"
    # Kubernetes stops the sidecar after the application: the rest of the grace period is for the drain.
    application_s = pod["terminationGracePeriodSeconds"] - settings.drain_delay_s - settings.drain_timeout_s
    assert application_s >= 30 + EXIT_MARGIN_S


@pytest.mark.parametrize("folder", ["base", "example"])
def test_whatever_selects_the_gateway_finds_it(folder: str) -> None:
    objects = render(folder)
    deployment = only(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert only(objects, "Service")["spec"]["selector"] == labels
    assert only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    for spread in pod["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"] == labels
    assert pod["serviceAccountName"] == only(objects, "ServiceAccount")["metadata"]["name"]
    target = only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "the autoscaler counts"
    ports = {port["name"] for port in pod["containers"][0]["ports"]}
    assert {port["targetPort"] for port in only(objects, "Service")["spec"]["ports"]} <= ports


def test_requests_in_flight_scale_too_where_the_component_is_used(tmp_path: Path) -> None:
    before, after = render("base"), with_component("in-flight", tmp_path)
    metrics = only(after, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metrics[0] == only(before, "HorizontalPodAutoscaler")["spec"]["metrics"][0]
    assert metrics[1]["pods"]["metric"]["name"] == "gateway_requests_in_flight"
    assert int(metrics[1]["pods"]["target"]["averageValue"]) <= settings_of("base").max_requests_in_flight / 2
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(only(after, "HorizontalPodAutoscaler"), version, strict=True)


def test_traces_reach_their_collector_where_the_component_is_used(tmp_path: Path) -> None:
    after = with_component("traces", tmp_path)
    environment = config_map_of(after)
    assert environment["GATEWAY_TRACES"] == "on"
    assert config_map_of(render("base")).items() <= environment.items()
    endpoint = urlsplit(environment["OTEL_EXPORTER_OTLP_ENDPOINT"])
    before, policy = only(render("base"), "NetworkPolicy"), only(after, "NetworkPolicy")
    assert outgoing(policy) == outgoing(before) | {(endpoint.port, "TCP")}
    (peer,) = policy["spec"]["egress"][-1]["to"]
    assert endpoint.hostname is not None
    assert endpoint.hostname.split(".")[1] in peer["namespaceSelector"]["matchLabels"].values()
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(policy, version, strict=True)


def config_map_of(objects: list[Object]) -> dict[str, str]:
    data: dict[str, str] = only(objects, "ConfigMap")["data"]
    return data


def with_component(name: str, folder: Path) -> list[Object]:
    """Return the objects of `base` with a component."""
    base, component = (os.path.relpath(KUBERNETES / one, folder.resolve()) for one in ("base", name))
    (folder / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    return render(folder)


@pytest.mark.parametrize("workload", cases("Deployment", "Job"))
def test_the_files_of_private_authorities_get_into_each_container(workload: Object) -> None:
    container = gateway_of(workload)
    volumes = {one["name"]: one for one in workload["spec"]["template"]["spec"]["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    # Optional: a public authority needs none.
    assert mounts["/etc/sms-gateway/ca"]["configMap"] == {"name": "sms-gateway-ca", "optional": True}


def test_the_guide_names_the_files_of_private_authorities_where_they_are_mounted() -> None:
    blocks = code_blocks("docs/kubernetes.md", "### Private authorities")
    made = set(re.findall(r"--from-file=(\S+)", blocks[0]))
    values = dict(line.split("=", 1) for line in blocks[1].splitlines())
    settings = config.load(values)
    parameters = parse_qs(urlsplit(settings.database_url).query)
    assert {*parameters["sslrootcert"], settings.amqp_ca_file} == {f"/etc/sms-gateway/ca/{name}" for name in made}


def test_the_administration_pod_has_the_owners_secret_and_the_files(tmp_path: Path) -> None:
    """A stand-in for kubectl writes the option --overrides."""
    (tmp_path / "kubectl").write_text('#!/bin/sh\nfor one; do case $one in --overrides=*) echo "$one";; esac; done\n')
    (tmp_path / "kubectl").chmod(0o755)
    (command,) = code_blocks("docs/kubernetes.md", "## Administration")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["/bin/sh", "-euc", command], env={"PATH": path}, check=True, capture_output=True, text=True)  # noqa: S603
    pod = json.loads(done.stdout.removeprefix("--overrides="))["spec"]
    job = only(render("migrate"), "Job")["spec"]["template"]["spec"]
    assert pod["volumes"] == job["volumes"]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == job["containers"][0]["volumeMounts"]
    assert container["envFrom"] == [{"secretRef": {"name": "sms-gateway-owner"}}]


@pytest.fixture
def without_operators(tmp_path: Path) -> list[Object]:
    """Return the objects of a copy of the example with the kustomization that the guide shows."""
    folder = shutil.copytree(KUBERNETES, tmp_path.resolve() / "kubernetes")
    (block,) = code_blocks("docs/kubernetes.md", "## Without operators", "yaml")[:1]
    (folder / "example/kustomization.yaml").write_text(block)
    for name in ("certificate.yaml", "gateway.yaml"):
        (folder / "example" / name).unlink()
    return render(folder / "example")


def test_without_operators_the_gateway_is_the_same_and_reaches_any_nodes(without_operators: list[Object]) -> None:
    kinds = {one["kind"] for one in without_operators}
    assert kinds == {one["kind"] for one in render("base")} | {"Namespace", "Ingress"}
    for one in without_operators:
        kubernetes_validate.validate(one, KUBERNETES_VERSIONS[-1], strict=True)
    gateway = gateway_of(only(without_operators, "Deployment"))
    assert gateway["image"] == gateway_of(only(render("example"), "Deployment"))["image"]
    assert "env" not in gateway, "both URLs come from the Secret"
    policy, example = only(without_operators, "NetworkPolicy"), only(render("example"), "NetworkPolicy")
    assert outgoing(policy) == outgoing(example)
    changed = [
        rule["ports"]
        for rule, before in zip(policy["spec"]["egress"], example["spec"]["egress"], strict=True)
        if rule != before
    ]
    assert changed == [[{"port": 5671}]]


def test_without_operators_the_queue_has_the_same_limit() -> None:
    (command,) = code_blocks("docs/kubernetes.md", "## Without operators")
    program, verb, *options, name, pattern, definition = shlex.split(command.replace("\\\n", ""))
    policy = only(render("rabbitmq"), "Policy")["spec"]
    assert [program, verb, *options] == ["rabbitmqctl", "set_policy", "--apply-to", policy["applyTo"]]
    assert (name, pattern) == (policy["name"], policy["pattern"])
    assert json.loads(definition) == policy["definition"]


def test_prometheus_without_its_operator_finds_the_pods_under_the_same_job() -> None:
    """Debian's promtool knows no kubernetes_sd_configs."""
    scrape = code_blocks("docs/kubernetes.md", "## Without operators", "yaml")[1]
    (job,) = yaml.safe_load(scrape)["scrape_configs"]
    assert f'job="{job["job_name"]}"' in ALERTS.read_text()
    labels = only(render("base"), "Deployment")["spec"]["template"]["metadata"]["labels"]
    (relabel,) = job["relabel_configs"]
    assert relabel["action"] == "keep"
    assert relabel["source_labels"] == [
        "__meta_kubernetes_pod_label_app_kubernetes_io_name",
        "__meta_kubernetes_pod_container_port_name",
    ]
    assert relabel["regex"] == f"{labels['app.kubernetes.io/name']};ops"


def outgoing(policy: Object) -> set[tuple[int, str]]:
    return {(p["port"], p.get("protocol", "TCP")) for rule in policy["spec"]["egress"] for p in rule["ports"]}


def test_the_gateways_network_lets_through_what_it_needs_and_nothing_else() -> None:
    policy = only(render("example"), "NetworkPolicy")
    broker_ports = {urlsplit(node).port for node in settings_of("example").amqp_nodes()}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert outgoing(policy) == {(53, "UDP"), (53, "TCP"), (5432, "TCP"), *((port, "TCP") for port in broker_ports)}
    assert [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]] == ["api", "ops"]
    rules = policy["spec"]["ingress"] + policy["spec"]["egress"]
    assert all(rule.get("from") or rule.get("to") for rule in rules), "a rule without a peer lets everybody through"


def test_the_migrations_network_leads_to_the_database_alone() -> None:
    objects = render("migrate")
    policy, job = only(objects, "NetworkPolicy"), only(objects, "Job")
    assert policy["spec"]["podSelector"]["matchLabels"] == job["spec"]["template"]["metadata"]["labels"]
    assert outgoing(policy) == {(53, "UDP"), (53, "TCP"), (5432, "TCP")}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy["spec"]
    assert gateway_of(job)["args"] == ["migrate", "--grant-to", "gateway_service"]


def test_the_migration_to_copy_has_the_examples_image_and_namespace() -> None:
    job, deployment = only(render("migrate-example"), "Job"), only(render("example"), "Deployment")
    assert gateway_of(job)["image"] == gateway_of(deployment)["image"]
    assert job["metadata"]["namespace"] == deployment["metadata"]["namespace"]


def nodes_of(cluster: Object) -> list[str]:
    """Return the host names that RabbitMQ's cluster operator gives to the nodes."""
    name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
    return [f"{name}-server-{number}.{name}-nodes.{namespace}.svc" for number in range(cluster["spec"]["replicas"])]


def test_the_example_names_every_node_of_the_cluster_by_its_own_address() -> None:
    hosts = nodes_of(only(render("example"), "RabbitmqCluster"))
    assert [urlsplit(node).hostname for node in settings_of("example").amqp_nodes()] == hosts
    assert len(hosts) >= 3


def test_rabbitmqs_version_is_one_that_was_tested() -> None:
    image = only(render("rabbitmq"), "RabbitmqCluster")["spec"]["image"]
    version = re.fullmatch(r"rabbitmq:(\d+\.\d+\.\d+)-management", image)
    assert version, "an image without a whole version changes without a change of this file"
    assert version[1] in row_of_versions("RabbitMQ")


def test_the_versions_of_kubernetes_are_those_that_the_manual_names() -> None:
    assert re.findall(r"\d\.\d+", row_of_versions("Kubernetes")) == KUBERNETES_VERSIONS


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Return a copy of deploy/kubernetes in which the example has another namespace and the component `monitoring`."""
    folder = shutil.copytree(KUBERNETES, tmp_path.resolve() / "kubernetes")
    for file, before, after in (
        ("example/common/kustomization.yaml", "namespace: sms\n", "namespace: elsewhere\n"),
        ("example/kustomization.yaml", "# - ../monitoring\n", "- ../monitoring\n"),
    ):
        text = (folder / file).read_text()
        assert text.count(before) == 1
        (folder / file).write_text(text.replace(before, after))
    return folder


def test_the_namespace_stands_in_one_place(copied: Path) -> None:
    objects = [*render(copied / "example"), *render(copied / "migrate-example")]
    for one in objects:
        name = one["metadata"]["name"] if one["kind"] == "Namespace" else one["metadata"]["namespace"]
        assert name == "elsewhere", f"{one['kind']} {one['metadata']['name']}"
    hosts = nodes_of(only(objects, "RabbitmqCluster"))
    assert [urlsplit(node).hostname for node in settings_of(copied / "example").amqp_nodes()] == hosts
    assert not re.search(r"\bsms\.svc\b", yaml.safe_dump(objects))


def test_the_certificate_is_for_the_hosts_that_the_gateway_connects_to(copied: Path) -> None:
    for folder in ("example", copied / "example"):
        objects = render(folder)
        certificate, cluster = only(objects, "Certificate"), only(objects, "RabbitmqCluster")
        assert certificate["spec"]["secretName"] == cluster["spec"]["tls"]["secretName"]
        wildcard, service = certificate["spec"]["dnsNames"]
        assert {"*." + host.partition(".")[2] for host in nodes_of(cluster)} == {wildcard}
        assert service == f"{cluster['metadata']['name']}.{cluster['metadata']['namespace']}.svc"


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_monitoring_component_follows_its_schemas(copied: Path, version: str) -> None:
    objects = render(copied / "example")
    assert {"PodMonitor", "PrometheusRule"} == {one["kind"] for one in objects} - {
        one["kind"] for one in render("example")
    }
    for one in objects:
        check_schema(one, version)


def test_the_pod_monitor_scrapes_the_gateways_pods_alone_under_the_job_that_the_alerts_name(copied: Path) -> None:
    objects = render(copied / "example")
    monitor = only(objects, "PodMonitor")["spec"]
    gateway, migration = only(objects, "Deployment"), only(render("migrate-example"), "Job")
    wanted = monitor["selector"]["matchLabels"].items()
    labels = gateway["spec"]["template"]["metadata"]["labels"]
    assert wanted <= labels.items()
    assert not wanted <= migration["spec"]["template"]["metadata"]["labels"].items()
    # The operator takes the job's name from this label of the pod.
    job = labels[monitor["jobLabel"]]
    assert set(re.findall(r'job="([^"]+)"', ALERTS.read_text())) == {job}
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {port["name"]: port["containerPort"] for port in gateway_of(gateway)["ports"]}
    assert ports[endpoint["port"]] == settings_of("example").ops_port
    assert endpoint["path"] == "/metrics"
    scrape = yaml.safe_load((ALERTS.parent / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert endpoint["interval"] == scrape


def test_the_rules_for_the_prometheus_operator_are_those_of_prometheus(copied: Path) -> None:
    rule = only(render(copied / "example"), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text()), "run scripts/rules"


def test_the_ingress_leads_to_the_service_and_lets_the_largest_body_through() -> None:
    objects = render("example")
    ingress, service = only(objects, "Ingress"), only(objects, "Service")
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]]
    limits_mib = [int(value.removesuffix("m")) for value in ingress["metadata"]["annotations"].values()]
    assert len(limits_mib) == 2
    assert min(limits_mib) * 2**20 > MAX_BODY_BYTES


def test_the_sidecars_namespace_is_another_and_its_policy_leads_to_the_servers() -> None:
    objects, broker = render("sidecar-example"), only(render("example"), "RabbitmqCluster")
    deployment, policy = only(objects, "Deployment"), only(objects, "NetworkPolicy")
    assert {one["metadata"]["namespace"] for one in objects} == {"campaigns"}
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= (
        deployment["spec"]["template"]["metadata"]["labels"].items()
    )
    assert outgoing(policy) == outgoing(only(render("example"), "NetworkPolicy"))
    (selector,) = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for rule in policy["spec"]["egress"]
        if rule["ports"][0]["port"] == 5671
        for peer in rule["to"]
    ]
    assert selector == broker["metadata"]["namespace"]


def test_the_guides_commands_make_what_the_sidecars_namespace_needs(tmp_path: Path) -> None:
    """A stand-in for kubectl gives each value of a Secret, and keeps the commands that would create something."""
    (tmp_path / "kubectl").write_text(
        '#!/bin/sh\ncase $3 in get) printf secret | base64 ;; *) echo "$*" >>created ;; esac\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    guide = GUIDE.read_text().partition("\n## Sidecar\n")[2].partition("\n## ")[0]
    commands = guide.partition("```sh\n")[2].partition("```")[0]
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["/bin/sh", "-euc", commands], cwd=tmp_path, env={"PATH": path}, check=True)  # noqa: S603
    made = dict(line.split("=", 1) for line in (tmp_path / "sms-gateway.env").read_text().splitlines())
    settings = config.load(environment_of("sidecar-example") | made)
    nodes = [urlsplit(node) for node in settings.amqp_nodes()]
    assert [node.hostname for node in nodes] == nodes_of(only(render("example"), "RabbitmqCluster"))
    assert {node.password for node in nodes} == {(tmp_path / "broker.crt").read_text()} == {"secret"}
    created = (tmp_path / "created").read_text()
    pod = only(render("sidecar-example"), "Deployment")["spec"]["template"]["spec"]
    (volume,) = pod["volumes"]
    assert f"--namespace campaigns create configmap {volume['configMap']['name']} --from-file=broker.crt" in created
    assert settings.amqp_ca_file == "/etc/sms-gateway/ca/broker.crt"
    assert "--namespace campaigns create secret generic sms-gateway " in created


def test_the_brokers_users_may_do_what_they_must_and_no_more() -> None:
    objects = render("rabbitmq")
    settings = Settings(database_url="", amqp_url="")
    rights = {
        one["spec"]["userReference"]["name"]: one["spec"]["permissions"]
        for one in objects
        if one["kind"] == "Permission"
    }
    assert set(rights) == {one["metadata"]["name"] for one in objects if one["kind"] == "User"}
    exchange, queue = re.escape(settings.amqp_exchange), re.escape(settings.amqp_queue)
    assert rights["sms-gateway"] == {"configure": "^$", "write": rf"^{exchange}(\.dead)?$", "read": "^$"}
    assert rights["sms-consumer"] == {"configure": "^$", "write": "^$", "read": f"^{queue}$"}
    credentials = gateway_of(only(render("example"), "Deployment"))["env"][0]["valueFrom"]["secretKeyRef"]["name"]
    # The operator chooses this name.
    assert credentials == "sms-gateway-user-credentials"


def test_no_secret_lies_in_the_repository_and_each_that_is_wanted_is_explained() -> None:
    guide = GUIDE.read_text()
    wanted = {"sms-rabbitmq-tls", "sms-gateway-tls"}
    for folder in FOLDERS:
        for one in render(folder):
            assert one["kind"] != "Secret"
            if one["kind"] in ("Deployment", "Job"):
                wanted |= set(re.findall(r"'secretKeyRef': {[^}]*'name': '([^']+)'", str(one)))
                wanted |= set(re.findall(r"'secretRef': {'name': '([^']+)'", str(one)))
    assert {"sms-gateway", "sms-gateway-owner", "sms-gateway-user-credentials"} <= wanted
    assert not [name for name in wanted if f"`{name}`" not in guide]
