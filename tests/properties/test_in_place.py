"""A request that is decoded in place gives what it gives when it is decoded as a whole."""

import re
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.ingest import batch, wire
from gateway.ingest.wire import decode_bulk
from tests.properties.test_batch import comparable
from tests.properties.test_contact_data import EXAMPLES, FIELDS, arrays_of, damages, names, scalars, spaces, values

keys = names | st.sampled_from(
    [
        *['"messages"', '"messages"', r'"m\u0065ssages"', '"list_number"', '"dry_run"', r'"dry_ru\u006e"'],
        *['"x' + "x" * 250 + '"', r'"\q"', r'"\ud800"', '"é"', '"messages "', '"\t"'],
    ]
)
numbers = st.sampled_from(["1.5", "-1e300", "1" * 200, "1e400", "01", "-", "true", "false", '"+18005551000"'])
messages = st.lists(st.just("{" + FIELDS + "}") | values | numbers, max_size=6).map(
    lambda texts: f"[{','.join(texts)}]"
)
fields = st.tuples(spaces, keys, spaces, spaces, messages | values | numbers, spaces).map(
    lambda parts: "{}{}{}:{}{}{}".format(*parts)
)
requests = st.lists(fields, max_size=6).map(lambda texts: "{" + ",".join(texts) + "}") | arrays_of(scalars)


def outcome(body: bytes) -> Any:
    """Return all that comes of a body: its payloads and rows, or the type of the refusal."""
    try:
        decoded = decode_bulk(body)
        return comparable(batch.validate(decoded)), decoded.dry_run
    except GatewayError as refusal:
        position = re.search(r"near byte (\d+)", str(refusal))
        assert position is None or int(position[1]) <= len(body)
        return type(refusal)


@EXAMPLES
@given(
    request=requests,
    damage=damages,
    before=spaces,
    after=spaces,
    most_fields=st.sampled_from([0, 1, 2, 1_000]),
    most_elements=st.sampled_from([0, 1, 1_000]),
)
def test_in_place_or_as_a_whole(
    request: str, damage: tuple[int, int, str] | None, before: str, after: str, most_fields: int, most_elements: int
) -> None:
    if damage is not None:
        cut, drop, insert = damage
        request = request[:cut] + insert + request[cut + drop :]
    body = f"{before}{request}{after}".encode()
    expected = outcome(body)
    limits: dict[str, Any] = {"MAX_FIELDS": most_fields, "MAX_ELEMENTS": most_elements, "LARGE_BODY_BYTES": 0}
    for large in ({"MANY_COMMAS": -1}, {"HUGE_BODY_BYTES": 0}):
        with patch.multiple(wire, **limits | large):
            assert outcome(body) == expected
