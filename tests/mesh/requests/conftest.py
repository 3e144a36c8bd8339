"""A silence that is noticed soon, so that no test waits for long, and a server with TLS that is trusted."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from gpumesh.mesh.requests import silence_watch
from tests.mesh.requests.streams import PATIENCE_S
from tests.probes.test_wrong_server import certificate  # noqa: F401


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "MIN_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(silence_watch, "PAUSE_FACTOR", 1.0)


@pytest.fixture
def trusted_tls(
    certificate: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> ssl.SSLContext:
    """The context for a server that the gateway trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    monkeypatch.setattr("gpumesh.mesh.requests.connections.connection_pool._tls_context", lambda: trusting)
    return context
