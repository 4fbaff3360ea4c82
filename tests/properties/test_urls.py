"""URLs of shapes that nobody planned are refused by name, or their parts are those that the drivers see."""

import os
from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote

import pytest
from asyncpg import connect_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from gateway import config
from gateway.amqp.transport import address
from gateway.config import ConfigurationError
from gateway.postgres.pool import asyncpg_arguments
from gateway.urls import PARAMETERS
from tests.properties import MORE

SECRET = "hunter2"  # noqa: S105 - that of the URLs
BASE = {"GATEWAY_DATABASE_URL": "postgres://u@localhost/x", "GATEWAY_AMQP_URL": "amqp://localhost/"}
# What libpq and asyncpg read from the environment; none of it may have an effect.
POISON = {
    "PGHOST": "poison",
    "PGPORT": "tcp://10.0.0.1:5432",
    "PGUSER": "poison",
    "PGPASSWORD": "poison",
    "PGDATABASE": "poison",
    "PGPASSFILE": "/poison",
    "PGSERVICE": "poison",
    "PGSSLMODE": "poison",
    "PGSSLNEGOTIATION": "poison",
    "PGTARGETSESSIONATTRS": "poison",
    "PGGSSLIB": "poison",
    "PGKRBSRVNAME": "poison",
}


def mostly(usual: Sequence[str], odd: Sequence[str]) -> st.SearchStrategy[str]:
    """Draw from the usual texts in nine of ten cases: a URL with something odd in each place is always refused."""
    return st.integers(0, 9).flatmap(lambda place: st.sampled_from(odd if place == 9 else usual))


ODD = st.text("@:/?#[],&=+%' \"\\\0\n\té€.-_0aZ", max_size=8)
PASSWORD = st.builds("{}{}{}".format, ODD, st.just(SECRET), ODD)
HOST = mostly(
    ["localhost", "127.0.0.1", "[::1]", "a.b-c_d.e.", "%2Frun%2Fpg"],
    ["", "[", "::1", "a..b", "999.1.1.1", "-x", "[fe80::1%25e]", "[v1.x]", "%00", "é"],
)
PORT = mostly(["", ":", ":5432"], [":0", ":65536", ":abc", ":-1", ":٣", ":1_0", ":05432", ":5432:1"])
ADDRESSES = st.lists(st.builds("{}{}".format, HOST, PORT), min_size=1, max_size=3).map(",".join)
FOREIGN = [
    "host",
    "port",
    "user",
    "dbname",
    "database",
    "heartbeat",
    "keepalives_idle",
    "ssl",
    "",
    "pass%77ord",
    "a%0a",
]
PARAMETER = st.one_of(
    st.sampled_from([f"{name}={value}" for name, values in PARAMETERS.items() for value in values or ("", "1", "/x")]),
    st.sampled_from(["auth=plain", "auth=EXTERNAL", "heartbeat=5"]),
    st.builds("{}{}{}".format, st.sampled_from([*PARAMETERS, *FOREIGN]), st.sampled_from(["=", "=", ""]), ODD),
)
QUERY = st.one_of(st.just([]), st.lists(PARAMETER, max_size=3)).map("&".join)


@st.composite
def urls(draw: st.DrawFn, *schemes: str) -> str:
    password = draw(PASSWORD)
    written = draw(mostly([quote(password, safe="")], [password]))
    credentials = draw(mostly([f"u:{written}@", "u@"], ["", f":{written}@", "u%ff@"]))
    parameters = draw(mostly([""], [f"&password={written}", f"&sslpassword={written}"]))
    url = draw(mostly([f"{scheme}://" for scheme in schemes], ["http://", "postgres:", "AMQP://", "//", ""]))
    url += credentials + draw(ADDRESSES) + draw(mostly(["", "/", "/x"], ["/a/b", "/%2F", "/%ff", "/%00", "/a b"]))
    url += draw(mostly(["?"], [""])) + draw(QUERY) + parameters + draw(mostly([""], ["#x", "&", "\n", " ", "?"]))
    return draw(mostly(["{}"], ["'{}'", '"{}"', "{},", "'{}"])).format(url)


DATABASE_URLS, BROKER_URLS = urls("postgres", "postgresql"), urls("amqp", "amqps")


def loaded(variable: str, url: str) -> config.Settings | None:
    """Return the settings with this URL; None if they are refused, by name and without the password."""
    try:
        return config.load(BASE | {variable: url})
    except ConfigurationError as refusal:
        said = str(refusal)
    assert said.startswith(f"{variable} ")
    assert SECRET not in said
    return None


@settings(derandomize=MORE == 1, max_examples=300 * MORE, deadline=None)
@given(url=DATABASE_URLS)
def test_a_database_url_is_refused_by_name_or_asyncpg_sees_the_same_parts(url: str) -> None:
    accepted = loaded("GATEWAY_DATABASE_URL", url)
    if accepted is None:
        return
    assert SECRET not in repr(accepted)
    database = accepted.database()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in POISON.items():
            environment.setitem(os.environ, name, value)
        for one in database.hosts:
            arguments = {"dsn": None, "passfile": None, "service": None, "servicefile": None} | asyncpg_arguments(
                database, one
            )
            addresses, found = connect_utils._parse_connect_dsn_and_args(
                ssl=database.parameters["sslmode"] != "disable", target_session_attrs="primary", **arguments
            )
            is_socket = one.host.startswith("/")
            assert addresses == [f"{one.host}/.s.PGSQL.{one.port}" if is_socket else tuple(one)]
            assert (found.user, found.database) == (database.user, database.name)
            assert "poison" not in repr(found)


@settings(derandomize=MORE == 1, max_examples=300 * MORE, deadline=None)
@given(url=BROKER_URLS)
def test_a_broker_url_is_refused_by_name_or_aiormq_can_use_it(url: str) -> None:
    accepted = loaded("GATEWAY_AMQP_URL", url)
    if accepted is None:
        return
    assert SECRET not in repr(accepted)
    for text in accepted.amqp_nodes():
        node = URL(text).update_query(heartbeat=5, name="x")
        assert node.host
        assert "None" not in address(node)
        assert set(node.query) <= {"heartbeat", "name", "auth"}


@pytest.mark.parametrize(
    ("variable", "strategy"), [("GATEWAY_DATABASE_URL", DATABASE_URLS), ("GATEWAY_AMQP_URL", BROKER_URLS)]
)
def test_the_shapes_above_are_refused_and_accepted(variable: str, strategy: st.SearchStrategy[str]) -> None:
    """Otherwise one of the two properties would hold for want of examples."""
    outcomes = Counter[bool]()

    @settings(derandomize=True, max_examples=200, deadline=None, database=None)
    @given(url=strategy)
    def count(url: str) -> None:
        outcomes[loaded(variable, url) is not None] += 1

    count()
    assert min(outcomes[True], outcomes[False]) > 20
