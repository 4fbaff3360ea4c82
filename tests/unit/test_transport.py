"""The address of a broker node in logs and in `status`."""

import pytest
from yarl import URL

from gateway.amqp.transport import address


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("amqp://user:secret@rabbit/name", "rabbit:5672"),
        ("amqps://user:secret@rabbit/name", "rabbit:5671"),
        ("amqp://user:secret@rabbit:1234/name", "rabbit:1234"),
    ],
)
def test_an_address_has_the_port_also_where_the_url_leaves_it_out(node: str, expected: str) -> None:
    assert address(URL(node)) == expected
