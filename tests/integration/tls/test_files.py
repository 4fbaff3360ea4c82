"""Certificate files that could not work are refused at start, by the name of their variable."""

import ssl
from pathlib import Path

import pytest

from gateway import tls
from gateway.config import ConfigurationError
from tests.integration.tls.secured import Secured
from tests.support.gateways import run_gateway


def refusal(secured: Secured, **changes: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        tls.check(secured.settings(**changes))
    return str(refused.value)


def test_files_that_could_not_work_are_refused_at_start_by_the_variables_name(secured: Secured, tmp_path: Path) -> None:
    one, other = secured.authority.issue("a.internal"), secured.authority.issue("b.internal")
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("hello")
    for name in ("api_tls", "database", "amqp"):
        variable = f"GATEWAY_{name.upper()}"
        missing = refusal(secured, **{f"{name}_cert_file": "/nowhere.pem"})
        assert missing.startswith(f"{variable}_CERT_FILE='/nowhere.pem' cannot be read: No such file")
        unmatched = refusal(secured, **{f"{name}_cert_file": str(one.cert), f"{name}_key_file": str(other.key)})
        assert f"{variable}_CERT_FILE and {variable}_KEY_FILE cannot be used" in unmatched
        alone = refusal(secured, **{f"{name}_cert_file": "", f"{name}_key_file": str(one.key)})
        assert alone == f"{variable}_KEY_FILE is set without its certificate. Set {variable}_CERT_FILE"
        keyless = refusal(secured, **{f"{name}_cert_file": str(one.cert), f"{name}_key_file": ""})
        assert keyless == f"{variable}_KEY_FILE is not set, and the file of {variable}_CERT_FILE has no key"
        unknown = refusal(secured, **{f"{name}_cert_file": str(no_pem), f"{name}_key_file": ""})
        assert "must be PEM files" in unknown
        both = tmp_path / f"{name}.pem"
        both.write_bytes(one.cert.read_bytes() + one.key.read_bytes())
        tls.check(secured.settings(**{f"{name}_cert_file": str(both), f"{name}_key_file": ""}))
        if name != "api_tls":
            assert f"{variable}_CA_FILE" in refusal(secured, **{f"{name}_ca_file": str(no_pem)})
    url = secured.environment["GATEWAY_DATABASE_URL"] + "?sslrootcert=/nowhere.pem"
    assert "GATEWAY_DATABASE_" in refusal(secured, database_url=url)
    url = f"{secured.environment['GATEWAY_DATABASE_URL']}?sslkey={other.key}"
    unmatched = refusal(secured, database_url=url, database_cert_file=str(one.cert), database_key_file="")
    assert "must match its certificate" in unmatched


def test_a_client_may_not_renegotiate_and_speaks_no_old_tls(secured: Secured) -> None:
    """A renegotiation would cost a handshake's CPU each time."""
    one = secured.authority.issue("a.internal")
    context = tls.api_context(secured.settings(api_tls_cert_file=str(one.cert), api_tls_key_file=str(one.key)))
    assert context is not None
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_process_refuses_them_too_and_workers_on_one_socket(secured: Secured, tmp_path: Path) -> None:
    for changes, says in (
        ({"GATEWAY_AMQP_CA_FILE": "/nowhere.pem"}, "error: GATEWAY_AMQP_CA_FILE='/nowhere.pem' cannot be read"),
        ({"GATEWAY_API_SOCKET": str(tmp_path / "api")}, "error: GATEWAY_API_SOCKET is served by one process"),
    ):
        completed = run_gateway("serve", "--workers", "2", environment=secured.environment | changes)
        assert completed.returncode == 2
        assert completed.stderr.splitlines()[-1].startswith(says)
