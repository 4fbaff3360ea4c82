"""The parts of database and broker URLs: hosts, passwords, libpq's TLS parameters. No IO, no environment."""

import ipaddress
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

# libpq also has "prefer" and "allow". Both accept a plain connection, so a host in between can switch TLS off.
SSL_MODES = ("disable", "require", "verify-ca", "verify-full")
POSTGRES, AMQP = ("postgres", "postgresql"), ("amqp", "amqps")


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


def urls_of_hosts(url: str) -> list[str]:
    """Return one URL for each host of `//user@one:5432,two:5432/name`, libpq's form for several hosts."""
    parts = split_url(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    return [parts._replace(netloc=credentials + at + host).geturl() for host in hosts.split(",")]


def is_complete(url: str, schemes: tuple[str, ...]) -> bool:
    """Return False for a URL of another scheme, without a host, or with an unescaped password.

    An AMQP URL names exactly one host. PostgreSQL URLs may name several, or none (a unix socket).
    """
    is_amqp = schemes == AMQP
    try:
        parts = split_url(url)
        behind_host = url.partition(parts.netloc)[2] if parts.netloc else url
        # `.port` raises ValueError for text. The text may be a password: `//user:password/name`, without a host.
        ports = [urlsplit(f"//{host}").port for host in parts.netloc.rpartition("@")[2].split(",")]
    except ValueError:
        return False
    return (
        parts.scheme in schemes and "@" not in behind_host and (not is_amqp or bool(parts.hostname and len(ports) == 1))
    )


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
        is_plain = is_local(url) and not has_root
        missing["sslmode"] = "disable" if is_plain else "verify-full"
        if not is_plain and not has_root:
            missing["sslrootcert"] = "system"
    return f"{url}{'&' if parts.query else '?'}{urlencode(missing)}" if missing else url


def tls_parameters(url: str) -> dict[str, str]:
    """Return the parameters of a PostgreSQL URL after `with_tls`; of a repeated one, the last value."""
    return {parameter: values[-1] for parameter, values in parse_qs(split_url(with_tls(url)).query).items()}


def is_local(url: str) -> bool:
    """Return True if all hosts of a URL are this machine: loopback addresses or unix sockets."""
    parts = split_url(url)
    hosts = parts.netloc.rpartition("@")[2] or ",".join(parse_qs(parts.query).get("host", []))
    return all(map(_is_local_host, hosts.split(",")))


def _is_local_host(host: str) -> bool:
    if host.startswith(("/", "%2F", "%2f")):
        return True
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def without_password(url: str) -> str:
    """Return a URL with its password replaced by `***`, and without query and fragment."""
    parts = split_url(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return parts._replace(netloc=user + (colon and ":***") + at + hosts, query="", fragment="").geturl()
