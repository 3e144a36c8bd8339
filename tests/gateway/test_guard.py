import pytest

from gpumesh.gateway.guard import Guard

OPEN = Guard(None, frozenset({"https://chat.example.org"}), frozenset({"gpu-box"}))
KEYED = Guard("kéy".encode(), frozenset())


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:11430",
        "127.0.0.1:11430",
        "127.8.8.8",
        "[::1]:11430",
        "192.168.1.5:11430",
        "10.0.0.1",
        "box.local:80",
        "mesh.internal",
        "a.localhost",
        "gpu-box:11430",
    ],
)
def test_local_names_are_served(host: str) -> None:
    assert OPEN.host_allowed(host)


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "evil.example:11430", "8.8.8.8", "localhost.evil.com", "]["]
)
def test_a_name_that_was_rebound_to_this_machine_is_not(host: str | None) -> None:
    assert not OPEN.host_allowed(host)


def test_with_a_key_any_host_will_do() -> None:
    assert KEYED.host_allowed("mesh.example.org")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("https://chat.example.org", True),
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://evil.example", False),
        ("null", False),
        ("http://localhost.evil.example", False),
        ("http://0.0.0.0:3000", True),
        ("http://[::1]:3000", True),
        ("app://obsidian.md", True),
        ("vscode-webview://0abc", True),
        ("tauri://localhost", True),
        ("http://[", False),
        ("", False),
    ],
)
def test_origins(origin: str | None, allowed: bool) -> None:
    assert OPEN.origin_allowed(origin) is allowed


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"Authorization": "Bearer kéy"}, True),
        ({"Authorization": "bearer  kéy "}, True),
        ({"Authorization": "Basic kéy"}, False),
        ({"Authorization": "Bearer kéyy"}, False),
        ({"x-api-key": "kéy"}, True),
        ({"x-api-key": ""}, False),
        ({"x-api-key": "another service's", "Authorization": "Bearer kéy"}, True),
        ({"x-api-key": "kéy", "Authorization": "Bearer another service's"}, True),
        ({"x-api-key": "no", "Authorization": "Bearer no"}, False),
        ({"Authorization": "Bearer \udcff"}, False),
    ],
)
def test_keys(headers: dict[str, str], allowed: bool) -> None:
    assert KEYED.key_allowed(headers) is allowed
    assert OPEN.key_allowed(headers)


def test_what_a_preflight_is_told() -> None:
    asks = {"Access-Control-Request-Headers": "x-one, x-two", "Access-Control-Request-Private-Network": "true"}
    told = OPEN.cors_headers("https://chat.example.org", asks)
    assert told["Access-Control-Allow-Origin"] == "https://chat.example.org"
    assert told["Access-Control-Allow-Headers"] == "x-one, x-two"
    assert told["Access-Control-Allow-Private-Network"] == "true"
    assert "X-GPUMesh-Node" in told["Access-Control-Expose-Headers"]
    plain = OPEN.cors_headers("https://chat.example.org", {})
    assert plain["Vary"] == "Origin", "a cache must not give one page the answer to another"
    assert "Access-Control-Allow-Private-Network" not in plain
