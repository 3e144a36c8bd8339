import pytest

from gpumesh.gateway.access.api_keys import ApiKeys, hash_key
from gpumesh.gateway.access.guard import Guard, is_blind_cross_site_request, is_request_to_render
from gpumesh.gateway.http.client_key import ClientKey
from gpumesh.gateway.http.errors import BadRequest

OPEN = Guard(None, frozenset({"https://chat.example.org"}), frozenset({"gpu-box"}))
KEY = ClientKey("OWN_KEY")
KEYED = Guard(ApiKeys({hash_key("kéy".encode()): KEY}), frozenset())


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
def test_a_name_that_was_rebound_to_this_machine_is_refused(host: str | None) -> None:
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
def test_which_origins_are_allowed(origin: str | None, allowed: bool) -> None:
    assert OPEN.origin_allowed(origin) is allowed
    assert OPEN.origin_allowed(origin, host="192.168.1.5:11430") is allowed


def test_the_gateways_own_page_is_allowed_under_the_address_at_which_it_was_opened() -> None:
    host = "192.168.1.5:11430"
    for address in (host, "localhost:11430", "[fd00::5]:11430"):
        assert OPEN.origin_allowed(f"http://{address}", host=address)
    assert KEYED.origin_allowed("https://gpu.example", host="GPU.example")
    assert not OPEN.origin_allowed("http://rebound.local", host="rebound.local"), "without a key a name is no proof"
    for other in ("http://192.168.1.5:3000", "http://192.168.1.5", "ftp://192.168.1.5:11430", f"http://a@{host}"):
        assert not OPEN.origin_allowed(other, host=host)
    assert not OPEN.origin_allowed("http://", host="")


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"authorization": "Bearer kéy"}, True),
        ({"authorization": "bearer  kéy "}, True),
        ({"authorization": "Basic kéy"}, False),
        ({"authorization": "Bearer kéyy"}, False),
        ({"x-api-key": "kéy"}, True),
        ({"x-api-key": ""}, False),
        ({"x-api-key": "another service's", "authorization": "Bearer kéy"}, True),
        ({"x-api-key": "kéy", "authorization": "Bearer another service's"}, True),
        ({"x-api-key": "no", "authorization": "Bearer no"}, False),
        ({"authorization": "Bearer \udcff"}, False),
    ],
)
def test_either_header_may_hold_the_key(headers: dict[str, str], allowed: bool) -> None:
    assert OPEN.require_key(headers) is None
    if allowed:
        assert KEYED.require_key(headers) == KEY
    else:
        with pytest.raises(BadRequest):
            KEYED.require_key(headers)


def test_the_headers_of_a_preflights_answer() -> None:
    headers = {"access-control-request-headers": "x-one, x-two", "access-control-request-private-network": "true"}
    fields = OPEN.cors_headers("https://chat.example.org", headers)
    assert fields["Access-Control-Allow-Origin"] == "https://chat.example.org"
    assert fields["Access-Control-Allow-Headers"] == "x-one, x-two"
    assert fields["Access-Control-Allow-Private-Network"] == "true"
    assert "X-GPUMesh-Node" in fields["Access-Control-Expose-Headers"]
    assert "X-GPUMesh-Why" in fields["Access-Control-Expose-Headers"]
    plain = OPEN.cors_headers("https://chat.example.org", {})
    assert plain["Vary"] == "Origin", "a cache must not give one page the answer to another"
    assert "Access-Control-Allow-Private-Network" not in plain


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:40123", False),
        ("http://localhost:40123", False),
        ("http://[::1]:40123", False),
        ("https://localhost:40123", False),
        ("http://localhost", False),
        ("http://127.0.0.1:40124", True),
        ("https://localhost", True),
        ("https://chat.example.org", True),
        ("tauri://localhost", True),
        ("http://localhost:99999", False),
    ],
)
def test_a_page_behind_a_tunnels_port_is_refused(origin: str, allowed: bool) -> None:
    assert OPEN.origin_allowed(origin, backend_ports={40123, 80}) is allowed


def test_a_page_behind_a_tunnels_port_is_allowed_if_mesh_yaml_names_it() -> None:
    named = Guard(None, frozenset({"http://localhost:40123"}))
    assert named.origin_allowed("http://localhost:40123", backend_ports={40123})


@pytest.mark.parametrize(
    ("headers", "elsewhere", "page"),
    [
        ({}, False, False),
        ({"sec-fetch-dest": "empty"}, False, False),
        ({"sec-fetch-dest": "document"}, True, False),
        ({"sec-fetch-dest": "iframe"}, True, True),
        ({"sec-fetch-dest": "script"}, True, True),
        ({"sec-fetch-dest": "serviceworker"}, True, True),
        ({"sec-fetch-dest": ""}, True, True),
        ({"sec-fetch-dest": "something-new"}, True, True),
        ({"service-worker": "script"}, True, True),
        ({"sec-fetch-dest": "empty", "service-worker": ""}, True, True),
    ],
)
def test_an_answer_that_a_browser_would_show_or_run_is_refused(
    headers: dict[str, str], elsewhere: bool, page: bool
) -> None:
    assert is_request_to_render(headers, is_own_page=False) is elsewhere
    assert is_request_to_render(headers, is_own_page=True) is page


@pytest.mark.parametrize(
    ("headers", "blind"),
    [
        ({}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "same-site"}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "something-new"}, True),
        ({"sec-fetch-site": "cross-site", "origin": "https://chat.example.org"}, False),
    ],
)
def test_a_cross_site_request_without_an_origin_is_refused(headers: dict[str, str], blind: bool) -> None:
    assert is_blind_cross_site_request(headers) is blind
