import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.lengths import (
    DEFAULT_TOKENS,
    MAX_CLIENTS,
    MAX_PER_CLIENT,
    MAX_TOKENS,
    ExpectedLengths,
    remaining,
)

CHAT = "/api/chat"
MODEL = "m:latest"


def learned(*answers: tuple[str, int], route: str = CHAT, count: int = 30) -> ExpectedLengths:
    lengths = ExpectedLengths()
    for _ in range(count):
        for client, tokens in answers:
            lengths.learn(client, route, MODEL, tokens)
    return lengths


def test_without_data_the_constant_is_expected() -> None:
    assert ExpectedLengths().expect("a", CHAT, MODEL) == DEFAULT_TOKENS


def test_each_client_has_its_own_length() -> None:
    lengths = learned(("short", 20), ("long", 900))
    assert lengths.expect("short", CHAT, MODEL) == pytest.approx(20, abs=45)
    assert lengths.expect("long", CHAT, MODEL) == pytest.approx(900, abs=45)
    assert lengths.expect("new", CHAT, MODEL) == pytest.approx(460, rel=0.1), "the mean of the route and model"
    assert "2 clients" in repr(lengths)


def test_other_routes_and_models_fall_back_to_what_is_more_general() -> None:
    lengths = learned(("a", 500))
    assert lengths.expect("a", CHAT, "other:latest") == pytest.approx(500, rel=0.1)
    assert lengths.expect("a", "/api/generate", MODEL) == pytest.approx(500, rel=0.1)
    for _ in range(30):
        lengths.learn("b", "/api/generate", MODEL, 10)
    assert lengths.expect("c", "/api/generate", "third:latest") == pytest.approx(10, abs=50)


def test_max_tokens_is_a_cap_and_no_forecast() -> None:
    lengths = learned(("a", 100))
    assert lengths.expect("a", CHAT, MODEL, 100_000) == lengths.expect("a", CHAT, MODEL)
    assert lengths.expect("a", CHAT, MODEL, 16) == 16.0
    assert lengths.expect("a", CHAT, MODEL, 0) == 0.0
    assert lengths.expect("a", CHAT, MODEL, -1) == lengths.expect("a", CHAT, MODEL), "Ollama: no maximum"


def test_one_answer_alone_does_not_decide() -> None:
    lengths = learned(("a", 100))
    lengths.learn("b", CHAT, MODEL, 5000)
    assert lengths.expect("b", CHAT, MODEL) < 2000


def test_a_client_that_changes_is_followed() -> None:
    lengths = learned(("a", 100), count=500)
    for _ in range(200):
        lengths.learn("a", CHAT, MODEL, 1000)
    assert lengths.expect("a", CHAT, MODEL) == pytest.approx(1000, rel=0.05)


def test_clients_cannot_fill_the_memory() -> None:
    lengths = ExpectedLengths()
    for number in range(MAX_CLIENTS + 10):
        lengths.learn(f"{number} " * 1000, CHAT, MODEL, 5)
        lengths.learn("regular", CHAT, MODEL, 5)
    assert len(lengths._clients) == MAX_CLIENTS
    assert "regular" in lengths._clients
    assert max(len(client) for client in lengths._clients) <= 200
    for number in range(2000):
        lengths.learn("regular", f"/{number}", f"{number}:latest", 5)
    assert len(lengths._clients["regular"]) == MAX_PER_CLIENT
    assert len(lengths._routes) <= 1000


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-10, 10**12)), max_size=50),
    st.one_of(st.none(), st.integers(-5, 10**7)),
)
def test_any_answers_keep_the_forecast_within_its_bounds(answers: list[tuple[str, int]], maximum: int | None) -> None:
    lengths = ExpectedLengths()
    for client, tokens in answers:
        lengths.learn(client, CHAT, MODEL, tokens)
    expected = lengths.expect("a", CHAT, MODEL, maximum)
    assert 0.0 <= expected <= MAX_TOKENS
    assert maximum is None or maximum < 0 or expected <= maximum


def test_an_answer_that_is_longer_than_expected_is_not_about_to_end() -> None:
    assert remaining(300, 0) == 300
    assert remaining(300, 100) == 200
    assert remaining(300, 280) == 140
    assert remaining(300, 1000) == 500
    assert remaining(300, 1000, 1100) == 100
    assert remaining(300, 1000, 900) == 0
    assert remaining(300, 1000, -1) == 500


@given(st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_the_expected_whole_length_never_falls_while_an_answer_grows(expected: float, done: float) -> None:
    assert remaining(expected, done + 1.0) + done + 1.0 >= remaining(expected, done) + done - 1e-6


def test_a_maximum_that_no_float_can_hold_is_a_maximum() -> None:
    lengths = ExpectedLengths()
    assert lengths.expect("c", "r", "m", 10**400) == lengths.expect("c", "r", "m", None)
    assert remaining(100.0, 20.0, 10**400) == 80.0
