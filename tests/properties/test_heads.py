"""A request head is found in whatever pieces it arrives, and all incomplete heads together are counted."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.web.heads import COST_OF_BYTE, COST_OF_LINE, MAX_HEAD_BYTES, Heads, IncompleteHead
from tests.properties import MORE

# Line ends before a head, which the parser skips, and the head with its blank line.
HEAD = re.compile(rb"[\r\n]*[^\r\n].*?\r\n\r\n", re.DOTALL)
PIECE = st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"\r\n\r\n"]), min_size=1, max_size=6).map(b"".join)


@settings(derandomize=MORE == 1, max_examples=1_000 * MORE, deadline=None)
@given(st.lists(PIECE, min_size=1, max_size=8))
def test_a_head_ends_where_it_ends_in_all_pieces_joined(pieces: list[bytes]) -> None:
    stream, head = b"".join(pieces), IncompleteHead(Heads())
    found = HEAD.match(stream)
    sent = 0
    for piece in pieces:
        at = 0
        while at < len(piece):
            end = head.end_in(piece, at)
            is_here = found is not None and found.end() <= sent + len(piece)
            assert sent + end == (found.end() if found and is_here else sent + len(piece))
            if found and is_here:
                head.clear()
                found = HEAD.match(stream, found.end())
            else:
                head.add(piece[at:end], most_lines=100)
            at = end
        sent += len(piece)


@settings(derandomize=MORE == 1, max_examples=100 * MORE, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), PIECE)), max_size=40))
def test_the_cost_of_all_is_the_sum_of_each(steps: list[tuple[int, bytes | None]]) -> None:
    heads = Heads()
    each = [IncompleteHead(heads) for _ in range(4)]
    arrived = [b""] * 4
    for index, piece in steps:
        if piece is None:
            each[index].clear()
            arrived[index] = b""
        else:
            each[index].add(piece, most_lines=5)
            arrived[index] += piece
        costs = [COST_OF_BYTE * len(data) + COST_OF_LINE * min(data.count(b"\n"), 5) for data in arrived]
        assert [head.cost for head in each] == costs
        assert [head.size for head in each] == list(map(len, arrived))
        assert heads.cost == sum(costs)


def test_the_bounds() -> None:
    heads = Heads()
    head = IncompleteHead(heads)
    # As many bytes and lines as cost exactly 64 MiB, at 3 a byte and 350 a line.
    head.add(b"\n\n" + b"a" * ((64 * 1024 * 1024 - 2 * 350) // 3 - 2), most_lines=100)
    assert (heads.cost, heads.are_too_expensive) == (64 * 1024 * 1024, False)
    head.add(b"a", most_lines=100)
    assert heads.are_too_expensive
    assert MAX_HEAD_BYTES == 32_768
