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
    def admit(self, octets: int) -> Iterator[None]:
        """Hold a place for a request with a body of `octets`. Raises Overloaded or Draining."""
        if self.closed:
            raise Draining
        if self.requests >= self._max_requests or self.octets + octets > self._max_octets:
            raise Overloaded
        self.requests += 1
        self.octets += octets
        try:
            yield
        finally:
            self.requests -= 1
            self.octets -= octets
