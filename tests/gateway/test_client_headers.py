"""A client's hop and credential headers end at the gateway; what a server may want to know passes."""

from __future__ import annotations

import pytest

from gpumesh.gateway.proxy import remove_credentials
from tests.gateway.fleet import CHAT, node, serve_hosts, serve_nodes
from tests.gateway.test_routing import Recorder
from tests.mesh.servers import serve

ENDS_HERE = [
    "api-key",
    "x-api-key",
    "apikey",
    "x-goog-api-key",
    "ocp-apim-subscription-key",
    "authorization",
    "x-auth-token",
    "x-access-token",
    "token",
    "x-amz-security-token",
    "x-csrf-token",
    "cookie",
    "proxy-authorization",
    "cf-access-jwt-assertion",
    "x-ms-client-principal",
    "x-webauth-user",
    "x-auth-request-email",
    "remote-user",
    "x-remote-user",
    "tailscale-user-login",
    "x-vault-token",
    "x-client-secret",
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "fastly-client-ip",
    "x-envoy-external-address",
    "x-original-forwarded-for",
    "x-amzn-trace-id",
    "cf-ray",
    "cf-ipcountry",
    "cdn-loop",
    "x-proxyuser-ip",
    "fly-client-ip",
    "x-vercel-forwarded-for",
    "x-cloud-trace-context",
    "max-forwards",
    "x-ssl-client-cert",
    "x-source-ip",
    "from",
    "http2-settings",
    "alt-used",
    "x-forwarded",
    "x-scheme",
    "x-host",
    "x-http-method-override",
    "x-rewrite-url",
    "x-originating-ip",
    "ssl-client-s-dn",
    "x-arr-ssl",
    "dpop",
    "signature-input",
    "x-hub-signature",
    "x-passwd",
    "x-pwd",
    "x-bearer",
    "x-sid",
    "x-sessid",
]
PASSES = [
    "user-agent",
    "accept",
    "content-type",
    "x-vendor",
    "x-request-id",
    "traceparent",
    "tracestate",
    "idempotency-key",
    "openai-organization",
    "openai-beta",
    "anthropic-version",
    "anthropic-beta",
    "x-stainless-lang",
    "x-max-tokens",
    "x-tokenizer",
    "x-keyboard-layout",
    "x-data-parallel-rank",
    "x-session-id",
    "x-inside",
    "x-bypass-cache",
]


async def test_hop_and_credential_headers_end_at_the_gateway() -> None:
    recorder = Recorder()
    async with serve(recorder) as backend, serve_nodes((node("a", backend.url),)) as fleet:
        headers = dict.fromkeys((*ENDS_HERE, *PASSES), "v") | {"content-type": "application/json"}
        answer = await fleet.client.post("/api/chat", json={**CHAT, "stream": False}, headers=headers)
        assert answer.status_code == 200
        assert not set(ENDS_HERE) & set(recorder.head)
        assert set(PASSES) <= set(recorder.head)


async def test_a_header_that_connection_names_ends_at_the_gateway() -> None:
    recorder = Recorder()
    async with serve(recorder) as backend, serve_nodes((node("a", backend.url),)) as fleet:
        headers = {"Connection": "keep-alive, X-Hop", "X-Hop": "v", "X-Vendor": "v"}
        answer = await fleet.client.post("/api/chat", json={**CHAT, "stream": False}, headers=headers)
        assert answer.status_code == 200
        assert "x-hop" not in recorder.head
        assert "x-vendor" in recorder.head


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/v1/x?api-version=1&api_key=s&a", "/v1/x?api-version=1&a"),
        ("/v1/x?key=s", "/v1/x"),
        ("/v1/x?access%5Ftoken=s&b=%20", "/v1/x?b=%20"),
        ("/v1/x?max_tokens=1&model=m&&", "/v1/x?max_tokens=1&model=m&&"),
        ("/v1/x?", "/v1/x?"),
        ("/v1/x?from=a&host=b&range=c&keyword=d", "/v1/x?from=a&host=b&range=c&keyword=d"),
    ],
)
def test_a_credential_in_the_query_ends_at_the_gateway(target: str, sent: str) -> None:
    assert remove_credentials(target) == sent


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_proxy_is_told_not_to_hold_a_stream_back(path: str) -> None:
    async with serve_hosts() as fleet:
        streamed = await fleet.client.post(path, json={**CHAT, "stream": True})
        assert streamed.headers["X-Accel-Buffering"] == "no"
