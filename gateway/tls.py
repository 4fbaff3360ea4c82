"""TLS: to the broker, to the database, and for callers. What is verified, and what to do when a handshake fails.

Contexts are made from their files at each connect, off the event loop: a renewed certificate needs no restart.
"""

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from gateway.config import PREFIX, ConfigurationError, Settings
from gateway.urls import is_local, tls_parameters

POSTGRES_ALPN = "postgresql"  # PostgreSQL 17 asks for it where TLS is spoken from the first byte

# OpenSSL's X509_V_ERR_*: what it has against a certificate.
NOT_YET_VALID, HAS_EXPIRED, HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH = 9, 10, 62, 64


def api_context(settings: Settings) -> ssl.SSLContext | None:
    """How callers are served: TLS 1.2 or newer with the configured certificate; None for plain HTTP."""
    if not settings.api_tls_cert_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # TLS 1.2 lets callers ask for one handshake after the other
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings.api_tls_cert_file, settings.api_tls_key_file)
    return context


def renew_api_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """Serve what the files hold now to new connections. Raises OSError, and then nothing has changed."""
    api_context(settings)  # a certificate and a key that do not match must not get half-way into the one in use
    _load_certificate(context, settings.api_tls_cert_file, settings.api_tls_key_file)


def broker_context(settings: Settings) -> ssl.SSLContext:
    """For amqps: chain and host name are verified. Reads files: not for the event loop. Raises OSError."""
    return _client_context(settings.amqp_ca_file, settings.amqp_cert_file, settings.amqp_key_file)


def is_wanted(url: str) -> bool:
    """Whether a database's URL asks for TLS; reads no file."""
    return tls_parameters(url)["sslmode"] != "disable"


def database_context(url: str) -> ssl.SSLContext | Literal[False]:
    """What a URL asks for in libpq's words (urls.with_tls); False: plain. Reads files. Raises OSError."""
    said = tls_parameters(url)
    mode, ca_file = said["sslmode"], said.get("sslrootcert", "system")
    if mode == "disable":
        return False
    context = _client_context("" if ca_file == "system" else ca_file, said.get("sslcert", ""), said.get("sslkey", ""))
    context.set_alpn_protocols([POSTGRES_ALPN])
    if mode != "verify-full":
        context.check_hostname = False
    if mode == "require" and "sslrootcert" not in said:  # with a root, libpq takes it for verify-ca
        context.verify_mode = ssl.CERT_NONE
    return context


def _client_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext:
    if ca_file:
        Path(ca_file).open("rb").close()  # OpenSSL's errors do not name the file
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        _load_certificate(context, cert_file, key_file)
    return context


def _load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    for file in (cert_file, key_file or cert_file):
        Path(file).open("rb").close()
    context.load_cert_chain(cert_file, key_file or None, password=lambda: "")  # else OpenSSL asks at the terminal


def check(settings: Settings) -> None:
    """Raise ConfigurationError for what could not work: files that are missing, unreadable, no PEM, or no match."""
    if settings.api_socket and settings.api_tls_cert_file:
        raise ConfigurationError(
            f"{PREFIX}API_SOCKET is for callers on this machine, and takes no {PREFIX}API_TLS_CERT_FILE. Unset one"
        )
    for party in ("API_TLS", "DATABASE", "AMQP"):
        key, cert = (f"{PREFIX}{party}_{kind}_FILE" for kind in ("KEY", "CERT"))
        files = {variable: path for variable, path in _files(settings) if variable.startswith(PREFIX + party)}
        if key in files and cert not in files:
            raise ConfigurationError(f"{key} is the key of no certificate. Set {cert}")
        for variable, path in files.items():
            try:
                Path(path).open("rb").close()
            except OSError as error:
                raise ConfigurationError(f"{variable}={path!r} cannot be read: {error.strerror}") from None
        try:
            match party:
                case "API_TLS":
                    api_context(settings)
                case "AMQP":
                    broker_context(settings)
                case _:
                    database_context(settings.database_url_with_tls())
        except OSError as error:
            variables = " and ".join(files) or f"{PREFIX}{party}_URL"
            raise ConfigurationError(
                f"{variables} cannot be used: {error}. Certificates and keys are PEM files, a key without password "
                "and the one of its certificate"
            ) from None


def _files(settings: Settings) -> Iterator[tuple[str, str]]:
    for name in settings.__struct_fields__:
        if name.endswith("_file") and getattr(settings, name):
            yield PREFIX + name.upper(), getattr(settings, name)


def weaknesses(settings: Settings) -> list[str]:
    """What can be read or forged on its way between machines, because the settings want it so."""
    found = [
        f"{PREFIX}AMQP_URL: amqp:// sends password and messages in the clear to {parts.hostname}; amqps:// does not"
        for parts in map(urlsplit, settings.amqp_nodes())
        if parts.scheme == "amqp" and not is_local(parts.geturl())
    ]
    mode = tls_parameters(settings.database_url)["sslmode"]
    if mode != "verify-full" and not is_local(settings.database_url):
        meaning = "sends all in the clear" if mode == "disable" else "takes another server for the database"
        found.append(f"{PREFIX}DATABASE_URL: sslmode={mode} {meaning}; sslmode=verify-full does not")
    return found


def advice(error: BaseException | None, party: Literal["AMQP", "DATABASE"]) -> str:
    """What to do about a handshake that failed, to be put behind the error; "" where TLS is not the matter."""
    url, ca_file = f"{PREFIX}{party}_URL", f"{PREFIX}{party}_CA_FILE"
    while error is not None and not isinstance(error, ssl.SSLError):
        if "rejected SSL upgrade" in str(error):  # asyncpg's words
            return f". The server offers no TLS: turn it on there, or set sslmode=disable in {url}"
        error = error.__cause__
    match error:
        case None:
            return ""
        case ssl.SSLCertVerificationError(verify_code=code) if code in (NOT_YET_VALID, HAS_EXPIRED):
            return ". Renew the server's certificate, or set this machine's clock"
        case ssl.SSLCertVerificationError(verify_code=code) if code in (HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH):
            return f". {url} must name the server as its certificate does"
        case ssl.SSLCertVerificationError():
            return f". {ca_file} must name the authority that signed the server's certificate"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return f". The server speaks no TLS on this port: {url} must name the one on which it does"
        case _:
            return f". If the server asks for a certificate of ours, {PREFIX}{party}_CERT_FILE must name it"
