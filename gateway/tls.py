"""TLS contexts for the broker, the database and the API, and advice about failed handshakes.

Contexts are made from their files at each connect, off the event loop: a renewed certificate needs no restart.
"""

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from gateway.config import PREFIX, ConfigurationError, Settings
from gateway.urls import Database, is_local

POSTGRES_ALPN = "postgresql"  # required by PostgreSQL 17 for direct TLS

# OpenSSL's X509_V_ERR_* codes.
NOT_YET_VALID, HAS_EXPIRED, HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH = 9, 10, 62, 64


def api_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the API's server context: TLS 1.2 or newer; None for plain HTTP. Raises OSError."""
    if not settings.api_tls_cert_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # each TLS 1.2 renegotiation would cost a handshake's CPU
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings.api_tls_cert_file, settings.api_tls_key_file)
    return context


def renew_api_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Load the certificate files again, for new connections. After OSError the old certificate stays in use."""
    api_context(settings)  # raises before a certificate that does not match its key reaches the context in use
    _load_certificate(context, settings.api_tls_cert_file, settings.api_tls_key_file)


def broker_context(settings: Settings) -> ssl.SSLContext:
    """Return the context for amqps: chain and host name are verified. Reads files, so it blocks. Raises OSError."""
    return _client_context(settings.amqp_ca_file, settings.amqp_cert_file, settings.amqp_key_file)


def is_wanted(database: Database) -> bool:
    """Return True if a database is reached by TLS. Reads no file."""
    return database.parameters["sslmode"] != "disable"


def database_context(database: Database) -> ssl.SSLContext | Literal[False]:
    """Return the context for a database's libpq parameters; False for a plain connection.

    Reads files, so it blocks. Raises OSError.
    """
    parameters = database.parameters
    mode, ca_file = parameters["sslmode"], parameters.get("sslrootcert", "system")
    if mode == "disable":
        return False
    context = _client_context(
        "" if ca_file == "system" else ca_file, parameters.get("sslcert", ""), parameters.get("sslkey", "")
    )
    context.set_alpn_protocols([POSTGRES_ALPN])
    if mode != "verify-full":
        context.check_hostname = False
    if mode == "require" and "sslrootcert" not in parameters:  # with a root certificate, libpq treats it as verify-ca
        context.verify_mode = ssl.CERT_NONE
    return context


def _client_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext:
    if ca_file:
        Path(ca_file).open("rb").close()  # raises an error that names the file; OpenSSL's does not
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        _load_certificate(context, cert_file, key_file)
    return context


def _load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    for file in (cert_file, key_file or cert_file):
        Path(file).open("rb").close()
    # Without a password callback, OpenSSL would ask for one at the terminal.
    context.load_cert_chain(cert_file, key_file or None, password=lambda: "")


def check(settings: Settings) -> None:
    """Raise ConfigurationError for files that are missing, unreadable, not PEM, or that do not match each other."""
    if settings.api_socket and settings.api_tls_cert_file:
        raise ConfigurationError(
            f"{PREFIX}API_SOCKET serves callers on this machine, without TLS. Unset it, or {PREFIX}API_TLS_CERT_FILE"
        )
    for party in ("API_TLS", "DATABASE", "AMQP"):
        key, cert = (f"{PREFIX}{party}_{kind}_FILE" for kind in ("KEY", "CERT"))
        files = {variable: path for variable, path in _files(settings) if variable.startswith(PREFIX + party)}
        if key in files and cert not in files:
            raise ConfigurationError(f"{key} is set without its certificate. Set {cert}")
        for variable, path in files.items():
            try:
                Path(path).open("rb").close()
            except OSError as error:
                raise ConfigurationError(f"{variable}={path!r} cannot be read: {error.strerror}") from None
        try:
            _make_context(settings, party)
        except OSError as error:
            has_key_of_url = party == "DATABASE" and "sslkey" in settings.database().parameters
            if cert in files and key not in files and not has_key_of_url and _has_no_key(files[cert]):
                raise ConfigurationError(f"{key} is not set, and the file of {cert} has no key") from None
            variables = " and ".join(files) or f"{PREFIX}{party}_URL"
            raise ConfigurationError(
                f"{variables} cannot be used: {error}. Certificates and keys must be PEM files. A key must have no "
                "password, and must match its certificate"
            ) from None


def _has_no_key(cert_file: str) -> bool:
    """Return True if the file has a certificate in PEM, and no key."""
    content = Path(cert_file).read_bytes()
    return b"CERTIFICATE-----" in content and b"PRIVATE KEY-----" not in content


def _make_context(settings: Settings, party: str) -> None:
    match party:
        case "API_TLS":
            api_context(settings)
        case "AMQP":
            broker_context(settings)
        case _:
            database_context(settings.database())


def _files(settings: Settings) -> Iterator[tuple[str, str]]:
    for name in settings.__struct_fields__:
        if name.endswith("_file") and getattr(settings, name):
            yield PREFIX + name.upper(), getattr(settings, name)


def weaknesses(settings: Settings) -> list[str]:
    """Return a sentence for each connection to another machine that can be read or forged with these settings."""
    found = [
        f"{PREFIX}AMQP_URL: amqp:// sends password and messages unencrypted to {parts.hostname}; use amqps://"
        for parts in map(urlsplit, settings.amqp_nodes())
        if parts.scheme == "amqp" and not is_local(parts.geturl())
    ]
    mode = settings.database().parameters["sslmode"]
    if mode != "verify-full" and not is_local(settings.database_url):
        meaning = "sends all data unencrypted" if mode == "disable" else "may accept another server as the database"
        found.append(f"{PREFIX}DATABASE_URL: sslmode={mode} {meaning}; use sslmode=verify-full")
    return found


def advice(error: BaseException | None, party: Literal["AMQP", "DATABASE"]) -> str:
    """Return what to do about a failed handshake, to append to the error's text; "" for any other error."""
    url, ca_file = f"{PREFIX}{party}_URL", f"{PREFIX}{party}_CA_FILE"
    while error is not None and not isinstance(error, ssl.SSLError):
        if "rejected SSL upgrade" in str(error):  # asyncpg's text
            return f". The server offers no TLS. Enable TLS there, or set sslmode=disable in {url}"
        error = error.__cause__
    match error:
        case None:
            return ""
        case ssl.SSLCertVerificationError(verify_code=code) if code in (NOT_YET_VALID, HAS_EXPIRED):
            return ". Renew the server's certificate, or set this machine's clock"
        case ssl.SSLCertVerificationError(verify_code=code) if code in (HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH):
            return f". The host name in {url} must be one of the certificate's names"
        case ssl.SSLCertVerificationError():
            return f". {ca_file} must be the file of the CA that signed the server's certificate"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return f". The server speaks no TLS on this port. {url} must have the server's TLS port"
        case _:
            return f". If the server requires a client certificate, set {PREFIX}{party}_CERT_FILE"
