"""The parts of database and broker URLs, and what such a URL may hold. No IO, no environment."""

import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

# libpq also has "prefer" and "allow". Both accept a plain connection, so a host in between can switch TLS off.
SSL_MODES = ("disable", "require", "verify-ca", "verify-full")
POSTGRES, AMQP = ("postgres", "postgresql"), ("amqp", "amqps")
POSTGRES_PORT = 5432

# The parameters of a database URL, beside those that name its parts, each with its values; none: any value.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "application_name": (),
    "channel_binding": ("disable", "prefer", "require"),
    "connect_timeout": (),
    "options": (),
    "search_path": (),
    "sslcert": (),
    "sslkey": (),
    "sslmode": SSL_MODES,
    "sslnegotiation": ("postgres", "direct"),
    "sslrootcert": (),
    "target_session_attrs": ("primary", "read-write"),  # what the gateway does in any case
}
NOT_FOR_TOOLS = {"channel_binding", "target_session_attrs"}  # lib/pq, which dbmate uses, would refuse or repeat them
MAX_CONNECT_TIMEOUT_S = 2**31 - 1  # as in libpq

_broken_escape = re.compile(r"%(?![0-9A-Fa-f]{2})").search
_unencoded = re.compile(r"[^!-~]|\\|[\[\]][^/?]*@").search  # brackets only around the host: libraries split there
_address = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]*))(?::([0-9]*))?").fullmatch
_host_name = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?").fullmatch
_parameter_name = re.compile(r"[A-Za-z0-9_.]{1,40}").fullmatch


class UnusableUrl(ValueError):
    """A URL that cannot work. The text goes on after the variable's name, and quotes nothing that may be secret."""


class Address(NamedTuple):
    """Host and port of a server. For a unix socket, `host` is its folder: a path that begins with a slash."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Database(NamedTuple):
    """The parts of a PostgreSQL URL, decoded. `parameters` has only names of PARAMETERS, and an explicit sslmode."""

    hosts: list[Address]
    user: str
    password: str
    name: str
    parameters: dict[str, str]

    @classmethod
    def of(cls, url: str, **files: str) -> "Database":
        """Take a URL apart, after `with_tls`. Raises UnusableUrl."""
        parts = _split(url, POSTGRES)
        given = _parameters(split_url(with_tls(url, **files)).query)
        credentials, _, addresses = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        hides_password = "password" in given
        user, password = _once(given, "user", _decoded(user)), _once(given, "password", _decoded(password))
        name = _once(given, "dbname", _decoded(parts.path.removeprefix("/")))
        hosts = _hosts(addresses, given)
        if not user:
            # The name of the process' user, libpq's default, is missing in a container with a user id of its own.
            raise UnusableUrl("names no user. Put the user before the host: postgres://user:password@host/name")
        _check_parameters(given, hides_password=hides_password)
        if given.get("channel_binding") == "require":
            # It asks for proof that the server is no other. asyncpg has no channel binding; a certificate proves it.
            given["sslmode"] = "verify-full"
        return cls(hosts, user, password, name or user, given)

    def __str__(self) -> str:
        return ",".join(map(str, self.hosts))

    def url(self, address: Address) -> str:
        """Return the URL of one host, for dbmate."""
        parameters = {name: value for name, value in self.parameters.items() if name not in NOT_FOR_TOOLS}
        netloc = str(address)
        if address.host.startswith("/"):
            netloc, parameters = "", parameters | {"host": address.host, "port": str(address.port)}
        password = f":{quote(self.password, safe='')}" if self.password else ""
        credentials = f"{quote(self.user, safe='')}{password}"
        return f"postgres://{credentials}@{netloc}/{quote(self.name, safe='')}?{urlencode(parameters)}"


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Split a URL of one of the schemes. Raises UnusableUrl for what is not one, or is not percent-encoded."""
    scheme = schemes[0]
    article = "an" if scheme.startswith("a") else "a"
    form = (
        f"Use a URL such as {scheme}://user:password@host/name, with the special characters of the password "
        "percent-encoded"
    )
    if _unencoded(url) or _broken_escape(url) or "#" in url:
        raise UnusableUrl(f"has a character that must be percent-encoded, such as a space, # or %. {form}")
    if url.partition("://")[0].lower() not in schemes:
        raise UnusableUrl(f"is not {article} {scheme} URL. {form}")
    parts = split_url(url)
    if "@" in (url.partition(parts.netloc)[2] if parts.netloc else url):
        raise UnusableUrl(f"is not {article} {scheme} URL. {form}")
    if "&" in parts.path:
        raise UnusableUrl(f"has & before the ? that begins its parameters. {form}")
    return parts


def _decoded(text: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise UnusableUrl("has percent-encoded bytes that are not UTF-8") from None
    if "\0" in decoded:
        raise UnusableUrl("has a NUL character")
    return decoded


def _parameters(query: str, *, may_be_empty: bool = True) -> dict[str, str]:
    """Return the parameters behind a URL's question mark; those without a value are left out. Raises UnusableUrl."""
    try:
        pairs = parse_qsl(query.strip("&"), keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        raise UnusableUrl("has parameters that are not all of the form name=value, in UTF-8") from None
    given: dict[str, str] = {}
    for name, value in pairs:
        known = "dbname" if name == "database" else name
        if "\0" in value:
            raise UnusableUrl("has a NUL character")
        if not (value or may_be_empty):
            raise UnusableUrl("has a parameter without a value. Remove it")
        if value:
            given[known] = _once(given, known, value)
    return given


def _once(given: dict[str, str], name: str, value: str) -> str:
    """Return `value`, or what `given` has for the name, and remove that. Raises UnusableUrl if there are both."""
    return _only_one(value, given.pop(name, ""))


def _only_one(first: str, second: str) -> str:
    """Return the one that is not empty. Raises UnusableUrl if there are both."""
    if first and second:
        raise UnusableUrl("has a parameter, or its user, password, host or name, twice. Leave out one")
    return first or second


def _hosts(addresses: str, given: dict[str, str]) -> list[Address]:
    """Return the addresses of a database URL, and remove them from its parameters. Raises UnusableUrl."""
    named = given.pop("host", "")
    ports = given.pop("port", "").split(",")
    if bool(addresses) == bool(named):
        raise UnusableUrl(
            "names a host twice. Leave out one"
            if named
            else "names no host. Put it behind the @, or the folder of a unix socket into host="
        )
    if addresses:
        found = [_one_address(address) for address in addresses.split(",")]
    else:
        found = [(host.removeprefix("[").removesuffix("]"), "") for host in named.split(",")]
    if len(ports) not in (1, len(found)):
        raise UnusableUrl("has another number of ports than of hosts")
    if len(ports) == 1:
        ports *= len(found)
    return [
        _checked(host, _only_one(own_port, parameter), POSTGRES_PORT)
        for (host, own_port), parameter in zip(found, ports, strict=True)
    ]


def _one_address(text: str) -> tuple[str, str]:
    """Return host and port of `host:port`; the port may be empty. Raises UnusableUrl."""
    found = _address(text)
    # What stands in the place of a port may be a password: `//user:password/name`, without a host.
    if found is None or (found[1] and not _is_ip(_decoded(found[1]))):
        raise UnusableUrl("has a host or a port that cannot be used. A port is a number from 1 to 65535")
    return _decoded(found[1] or found[2]), found[3] or ""


def _checked(host: str, port: str, default_port: int) -> Address:
    """Return the address; without a port, with the default. Raises UnusableUrl."""
    is_usable = host.startswith("/") or _is_ip(host) or _host_name(host)
    is_number = port.isascii() and port.isdigit() and len(port) <= len("65535") and 0 < int(port) <= 65535
    if not is_usable or (port and not is_number):
        raise UnusableUrl("has a host or a port that cannot be used. A port is a number from 1 to 65535")
    return Address(host, int(port or default_port))


def _check_parameters(given: dict[str, str], *, hides_password: bool) -> None:
    """Raise UnusableUrl for what the gateway would otherwise ignore, or find out only when it connects."""
    if unknown := given.keys() - PARAMETERS.keys():
        named = names_of(unknown, hides_password=hides_password)
        raise UnusableUrl(f"has {named}, not supported. Remove it. Supported parameters: {', '.join(PARAMETERS)}")
    for name, values in PARAMETERS.items():
        if values and given.get(name, values[0]) not in values:
            shown = f"{name}={given[name]}" if _parameter_name(given[name]) else f"another {name}"
            raise UnusableUrl(f"has {shown}. Set {name} to one of {', '.join(values)}")
    timeout = given.get("connect_timeout", "0")
    if not (timeout.isascii() and timeout.isdigit() and len(timeout) <= 10 and int(timeout) <= MAX_CONNECT_TIMEOUT_S):
        raise UnusableUrl("has a connect_timeout that is not a whole number of seconds")
    needs_tls = {"sslnegotiation": "direct", "channel_binding": "require"}
    for name, value in needs_tls.items():
        if given.get(name) == value and given["sslmode"] == "disable":
            raise UnusableUrl(f"has {name}={value}, which needs TLS. Set sslmode=verify-full, or remove {name}")


def names_of(parameters: Iterable[str], *, hides_password: bool) -> str:
    """Return the names of parameters for a message, unless one may be the rest of a password with an unescaped &."""
    is_shown = not hides_password and all(map(_parameter_name, parameters))
    return ", ".join(sorted(parameters)) if is_shown else "a parameter"


def check_broker(url: str) -> dict[str, str]:
    """Return the parameters of an AMQP URL. Raises UnusableUrl if something else in it cannot be used."""
    parts = _split(url, AMQP)
    credentials, _, address = parts.netloc.rpartition("@")
    host, port = _one_address(address)
    _checked(host, port, 0)
    if host.startswith("/"):
        raise UnusableUrl("names a unix socket. Brokers are reached over TCP")
    for text in (*credentials.split(":", 1), parts.path):
        _decoded(text)
    return _parameters(parts.query, may_be_empty=False)


def split_url(url: str) -> SplitResult:
    """Split a URL that may name several hosts. Raises ValueError.

    `urlsplit` alone refuses `//one,[::1]/name` since Python's security release of 2024.
    """
    scheme, slashes, rest = url.partition("://")
    end = min(at for at in (*map(rest.find, "/?#"), len(rest)) if at >= 0)
    return urlsplit(f"{scheme}{slashes}{rest[end:]}")._replace(netloc=rest[:end])


def split_nodes(urls: str) -> list[str]:
    """Return the URLs of a comma-separated list, in order."""
    return [url.strip() for url in urls.split(",") if url.strip()]


def with_tls(url: str, **files: str) -> str:
    """Return a PostgreSQL URL with an explicit sslmode, and with `files` as sslrootcert, sslcert and sslkey.

    Parameters that the URL already has stay as they are. Default sslmode: `disable` if all hosts are this machine,
    otherwise `verify-full`, with the system's CAs unless sslrootcert names others. libpq's own default, `prefer`,
    would fall back to a plain connection.
    """
    parts = split_url(url)
    given = parse_qs(parts.query)
    missing = {parameter: file for parameter, file in files.items() if file and parameter not in given}
    if "sslmode" not in given:
        has_root = "sslrootcert" in given or "sslrootcert" in missing
        is_plain = is_local(url) and not has_root and given.get("channel_binding") != ["require"]
        missing["sslmode"] = "disable" if is_plain else "verify-full"
        if not is_plain and not has_root:
            missing["sslrootcert"] = "system"
    if not missing:
        return url
    before, _, query = url.partition("?")
    return f"{before}?{'&'.join(filter(None, [query.strip('&'), urlencode(missing)]))}"


def is_local(url: str) -> bool:
    """Return True if all hosts of a URL are this machine: loopback addresses or unix sockets."""
    parts = split_url(url)
    hosts = parts.netloc.rpartition("@")[2] or ",".join(parse_qs(parts.query).get("host", []))
    return all(map(_is_local_host, hosts.split(",")))


def _is_local_host(host: str) -> bool:
    if host.startswith(("/", "%2F", "%2f")):
        return True
    found = _address(host)
    name = host if _is_ip(host) or found is None else found[1] or found[2]
    return ipaddress.ip_address(name).is_loopback if _is_ip(name) else name == "localhost"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def without_password(url: str) -> str:
    """Return a URL with its password replaced by `***`, and without query and fragment."""
    parts = split_url(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return parts._replace(netloc=user + (colon and ":***") + at + hosts, query="", fragment="").geturl()
