"""The httpx client of the tests: without proxies from the environment, and cheap to make."""

from __future__ import annotations

import ssl
from typing import Any

import httpx

# All servers of the tests are on loopback, without TLS. httpx reads all certificates of the system for each client
# otherwise. That takes 20 ms, and the tests make some thousand clients.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def loopback_client(**options: Any) -> httpx.AsyncClient:
    """``options`` are those of ``httpx.AsyncClient``."""
    return httpx.AsyncClient(trust_env=False, verify=_NO_CERTIFICATES, **options)
