"""A bounded place for requests in flight: what does not fit is refused before it costs anything."""

from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import Draining, Overloaded


class Admission:
    """Counts the requests in flight and the octets of their bodies."""

    def __init__(self, *, max_requests: int, max_octets: int) -> None:
        self._max_requests = max_requests
        self._max_octets = max_octets
        self.requests = 0
        self.octets = 0
        self.closed = False

    @contextmanager
    def admit(self) -> Iterator["Place"]:
        """Hold a place for a request. Raises Overloaded or Draining."""
        if self.closed:
            raise Draining
        if self.requests >= self._max_requests:
            raise Overloaded
        self.requests += 1
        place = Place(self)
        try:
            yield place
        finally:
            self.requests -= 1
            self.octets -= place.octets

    def reserve(self, octets: int) -> None:
        """Take room for a body; a Place gives it back."""
        if self.octets + octets > self._max_octets:
            raise Overloaded
        self.octets += octets


class Place:
    """One request's place, and the room reserved for its body."""

    __slots__ = ("_admission", "octets")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.octets = 0

    def reserve(self, octets: int) -> None:
        """Reserve room for a body before any of it is read. Raises Overloaded."""
        self._admission.reserve(octets)
        self.octets += octets
