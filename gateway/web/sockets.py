"""Listening sockets, and the limits of their connections."""

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from gateway.config import PREFIX, ConfigurationError

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that the kernel holds until they are accepted; beyond it, a caller's kernel tries again
SPARE_DESCRIPTORS = 128  # for everything that is not a caller's connection

ProtocolFactory = Callable[[], asyncio.Protocol]
ListenerName = Literal["API", "OPS"]  # as in the names of its settings


class Limits(NamedTuple):
    """The bounds of a listener's connections."""

    header_timeout_s: float  # for a request's head: from the accept, later from its first byte
    answer_timeout_s: float  # for a caller to read its answer
    max_connections: int


def fit_descriptors(limits: Limits) -> Limits:
    """Raise this process's descriptor limit, and return the limits with as many connections as it then allows.

    Without a free descriptor, the process could neither accept a connection nor reconnect to broker and database.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return limits
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fitting = max(1, min(limits.max_connections, soft - SPARE_DESCRIPTORS))
    if fitting < limits.max_connections:
        log.warning(
            "at most %s connections instead of %s: this process may have %s descriptors (ulimit -n)",
            fitting,
            limits.max_connections,
            soft,
        )
    return limits._replace(max_connections=fitting)


async def open_tcp(
    factory: ProtocolFactory,
    host: str,
    port: int,
    *,
    listener: ListenerName,
) -> asyncio.Server:
    """Accept connections on a TCP port.

    Raises ConfigurationError when host and port cannot be used: its text names the settings of the `listener`.
    """
    where: dict[str, Any] = {"host": host, "port": port}
    try:
        if host == "::":  # given the host, asyncio would leave out the addresses of IPv4
            where = {"sock": _bind_all(port)}
        return await asyncio.get_running_loop().create_server(factory, backlog=BACKLOG, **where)
    except (OSError, UnicodeError) as error:
        raise cannot_listen(host, port, listener, error) from None


def cannot_listen(host: str, port: int, listener: ListenerName, error: OSError | UnicodeError) -> ConfigurationError:
    """Return the ConfigurationError for an address that a listener cannot use."""
    if isinstance(error, UnicodeError):
        problem = "not a host name"
    else:
        # asyncio's text repeats the address. The codes of name resolution are negative, and have no text here.
        problem = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror)
    return ConfigurationError(
        f"cannot listen on {host} port {port}: {problem}. Set {PREFIX}{listener}_HOST and {PREFIX}{listener}_PORT to a "
        "free address of this machine"
    )


async def bind_tcp(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    """Return a socket for each address of the host, bound to the API's port and not listening yet.

    If it is shared, a second process can bind the same port in this way, so that a new supervisor need not wait for the
    workers of a dead one. Raises ConfigurationError.
    """
    bound: list[socket.socket] = []
    try:
        if host == "::":
            return [_bind_all(port, shared=shared)]
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # An address of a family that this system lacks is left out, as asyncio does.
        for family, _, _, _, address in dict.fromkeys(found):
            if bound:  # the system may have chosen the port
                address = (address[0], bound[0].getsockname()[1], *address[2:])
            try:
                bound.append(_bind(family, address, shared=shared))
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    raise
        if not bound:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    except (OSError, UnicodeError) as error:
        for each in bound:
            each.close()
        raise cannot_listen(host, port, "API", error) from None
    return bound


def _bind_all(port: int, *, shared: bool = False) -> socket.socket:
    """Return a socket that is bound to a port of all addresses, of IPv6 and IPv4. Raises OSError."""
    return _bind(socket.AF_INET6, ("::", port), shared=shared, only_ipv6=False)


def _bind(family: int, address: Any, *, shared: bool, only_ipv6: bool = True) -> socket.socket:
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


async def open_unix(factory: ProtocolFactory, path: str) -> asyncio.Server:
    """Accept connections on a unix socket; the socket of a dead process is replaced. Raises OSError."""
    return await asyncio.get_running_loop().create_unix_server(factory, path, backlog=BACKLOG)
