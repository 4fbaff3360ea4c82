"""No password is shown, whatever its characters."""

from urllib.parse import quote

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import config
from gateway.config import Settings
from tests.properties import MORE


def told(loaded: Settings) -> str:
    """Return every text form of the settings that a log line could contain."""
    return f"{loaded!r} {loaded} {loaded:} {loaded.masked()} {msgspec.json.encode(loaded.masked()).decode()}"


PASSWORDS = st.text("ABCabc019@:/,?#[]%&=+ ~.-_*$!'()\\äß€", min_size=3, max_size=20).map(lambda text: f"pä{text}ßw")


@settings(derandomize=MORE == 1, max_examples=150 * MORE, deadline=None)
@given(password=PASSWORDS)
def test_a_percent_encoded_password_of_any_characters_is_not_shown(password: str) -> None:
    encoded = quote(password, safe="")
    loaded = config.load(
        {
            "GATEWAY_DATABASE_URL": f"postgres://u:{encoded}@h1:5432,h2/db?options={encoded}",
            "GATEWAY_AMQP_URL": f"amqp://u:{encoded}@h1/, amqps://u:{encoded}@h2:5671/v",
        }
    )
    assert encoded in loaded.database_url
    assert loaded.amqp_nodes() == [
        f"amqp://u:{encoded}@h1/",
        f"amqps://u:{encoded}@h2:5671/v",
    ]
    assert encoded not in told(loaded)
    assert password not in told(loaded)
