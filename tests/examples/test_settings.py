"""The reference consumer refuses settings that it cannot keep its promises with, by their names."""

import re
from pathlib import Path

import msgspec
import pytest

from examples.consumer.settings import ConfigurationError, Settings, load, unknown_variables

README = (Path(__file__).parents[2] / "examples/consumer/README.md").read_text()

URLS = {"CONSUMER_DATABASE_URL": "postgres://u:secret@h/d", "CONSUMER_AMQP_URL": "amqp://u:secret@h/,amqp://u@h2/"}


def test_settings_come_from_the_environment() -> None:
    settings = load(
        URLS | {"CONSUMER_QUEUE": "sms.outbound.3", "CONSUMER_GROUP_WAIT_S": "0.2", "CONSUMER_PREFETCH": ""}
    )
    assert (settings.queue, settings.group_wait_s, settings.prefetch) == ("sms.outbound.3", 0.2, 1000)
    assert settings.amqp_nodes() == ["amqp://u:secret@h/", "amqp://u@h2/"]
    assert "secret" not in repr(settings)


def test_the_defaults_are_those_of_the_readme() -> None:
    documented: dict[str, float | str] = {}
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| ([^–|]+) \|", README, re.MULTILINE)
    for names, values in rows:
        for name, value in zip(re.findall(r"\w+", names), re.split(r", ", values), strict=True):
            documented[name.lower()] = float(value) if value[0].isdigit() else value.strip("`")
    assert documented == {
        field.name: field.default
        for field in msgspec.structs.fields(Settings)
        if field.default is not msgspec.NODEFAULT
    }


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("prefetch", ("1", "65535"), ("0", "65536")),  # AMQP has 16 bits for both
        ("amqp_heartbeat_s", ("1", "65535"), ("0", "65536")),
        ("group_size", ("1",), ("0",)),
        ("database_timeout_s", ("0.001", "3600"), ("0.0005", "3600.5", "inf")),  # PostgreSQL reads 0 ms as no timeout
        ("sweep_interval_s", ("0.001", "1e8"), ("0", "1.1e8", "nan")),
        # 24 hours of an Idempotency-Key, and the age limit: after so long no repeat can come.
        ("remember_ids_s", ("88200", "1e8"), ("1800", "88199", "inf")),
    ],
)
def test_numbers_have_bounds(name: str, accepted: tuple[str, ...], refused: tuple[str, ...]) -> None:
    variable = f"CONSUMER_{name.upper()}"
    for value in accepted:
        assert getattr(load(URLS | {variable: value}), name) == float(value)
    for value in refused:
        with pytest.raises(ConfigurationError, match=variable):
            load(URLS | {variable: value})


def test_a_database_may_have_several_hosts() -> None:
    assert load(URLS | {"CONSUMER_DATABASE_URL": "postgres://u@h1,h2/d"}).database_url == "postgres://u@h1,h2/d"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CONSUMER_DATABASE_URL", ""),
        ("CONSUMER_DATABASE_URL", "mysql://u:secret@h/d"),
        ("CONSUMER_AMQP_URL", ""),
        ("CONSUMER_AMQP_URL", "amqp://u:secret@h/,h2"),
        ("CONSUMER_GROUP_SIZE", "many"),
        ("CONSUMER_MAX_AGE_S", "7200"),  # the default of REMEMBER_IDS_S no longer covers it
    ],
)
def test_a_bad_setting_is_refused_by_name(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load(URLS | {variable: value})
    assert variable in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(("variable", "kind"), [("GROUP_SIZE", "whole number"), ("MAX_AGE_S", "number")])
def test_text_for_a_number_is_refused_in_plain_words(variable: str, kind: str) -> None:
    says = rf"^CONSUMER_{variable}='30m' cannot be used: it must be a {kind}, without a unit$"
    with pytest.raises(ConfigurationError, match=says):
        load(URLS | {f"CONSUMER_{variable}": "30m"})


def test_variables_that_are_no_setting_are_found() -> None:
    assert unknown_variables(URLS | {"CONSUMER_QUEUES": "x", "GATEWAY_QUEUE": "x"}) == ["CONSUMER_QUEUES"]
