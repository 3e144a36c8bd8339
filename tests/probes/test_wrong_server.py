"""HTTP against HTTPS and the other way round, with real TLS, as the probe meets it. What else may answer on a port is
in test_backend.py's table."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gpumesh.audit.catalog import CATALOG
from gpumesh.lab import profile
from gpumesh.lab.ollama import SimOllama
from gpumesh.mesh.requests.connections import connection_pool
from gpumesh.probes import http_client
from gpumesh.probes.backend import probe_backend
from gpumesh.probes.http_client import make_http_client
from gpumesh.probes.wrong_server import identify_wrong_server
from gpumesh.state import Finding
from gpumesh.topology import BackendSpec, Target

TARGET = Target("127.0.0.1", 11434)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with make_http_client() as made:
        yield made


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, with its key beside it in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + made.public_bytes(pem))
    return path


@asynccontextmanager
async def tls_server(certificate: Path) -> AsyncIterator[int]:
    """Its port. Nobody gets so far that it would have to answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def finding_of(client: httpx.AsyncClient, url: str) -> Finding:
    scheme = url.partition(":")[0]
    spec = BackendSpec(targets=(replace(TARGET, scheme=scheme),))
    (finding,) = (await probe_backend(client, spec, [url], api_key=None, timeout_s=20, node="iceland")).findings
    assert finding.code in CATALOG
    assert "start the server" not in (finding.hint or "")
    return finding


async def test_plain_http_to_a_port_that_speaks_tls(client: httpx.AsyncClient, certificate: Path) -> None:
    async with tls_server(certificate) as port:
        finding = await finding_of(client, f"http://127.0.0.1:{port}")
    assert finding.code == "wrong-scheme"
    assert "speaks HTTPS" in finding.message
    assert "url: https://127.0.0.1" in (finding.hint or "")


async def test_https_to_a_port_that_speaks_plain_http(client: httpx.AsyncClient) -> None:
    async with SimOllama(profile.make_instant_host()) as server:
        finding = await finding_of(client, server.url.replace("http:", "https:"))
    assert finding.code == "wrong-scheme"
    assert "speaks plain HTTP" in finding.message
    assert "url: http://127.0.0.1" in (finding.hint or "")


async def test_a_certificate_of_no_known_authority(client: httpx.AsyncClient, certificate: Path) -> None:
    async with tls_server(certificate) as port:
        finding = await finding_of(client, f"https://127.0.0.1:{port}")
    assert finding.code == "tls-refused"
    assert "certificate is not accepted: self" in finding.message
    assert "known authority" in (finding.hint or "")


def test_probes_and_requests_trust_the_authorities_of_this_system(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``SSL_CERT_FILE`` stands for the system's list of authorities."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert http_client._tls_context.__wrapped__("https").cert_store_stats()["x509"] == 1
    assert connection_pool._tls_context.__wrapped__().cert_store_stats()["x509"] == 1


async def test_https_to_an_ssh_server(client: httpx.AsyncClient) -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        finding = await finding_of(client, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert finding.code == "wrong-server"
    assert "an SSH server" in finding.message


async def test_a_server_that_resets_the_connection_leaves_no_error_behind() -> None:
    """asyncio reports an error that nobody took when its objects are freed, on the terminal of a command that ends."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    closed_futures: list[asyncio.Future[None]] = []

    class WatchedProtocol(asyncio.StreamReaderProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            closed_futures.append(self._closed)  # type: ignore[attr-defined]

    server = await asyncio.start_server(reset, "127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.streams, "StreamReaderProtocol", WatchedProtocol)
        async with server:
            assert await identify_wrong_server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") is None
    assert closed_futures
    assert all(future.done() and not future._log_traceback for future in closed_futures)
