"""No secret passes the log's filters, in any context."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.telemetry.log import redact
from tests.properties import MORE

KEY = "trk_" + "Kk0Zz9" * 5 + "aB"

EXAMPLES = settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)


@EXAMPLES
@given(
    before=st.text(max_size=5), after=st.text(max_size=5), number=st.from_regex(r"\+[1-9][0-9]{7,14}", fullmatch=True)
)
def test_no_whole_number_and_no_key_passes_in_any_context(before: str, after: str, number: str) -> None:
    shown = redact(f"{before}{number}{after} {before}{KEY}{after}")
    assert number not in shown
    assert KEY not in shown
