import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.mesh.requests import silence_watch
from gpumesh.mesh.requests.silence_watch import (
    DEFAULT_TIMEOUT_S,
    MAX_TIMEOUT_S,
    MIN_TIMEOUT_S,
    PauseTracker,
    silence_timeout_s,
)


@pytest.mark.parametrize(
    ("longest", "patience"),
    [
        (None, DEFAULT_TIMEOUT_S),
        (0.01, MIN_TIMEOUT_S),
        (0.25, MIN_TIMEOUT_S),
        (0.5, 10.0),
        (2.0, 40.0),
        (60.0, MAX_TIMEOUT_S),
    ],
)
def test_patience(longest: float | None, patience: float) -> None:
    assert silence_timeout_s(longest) == pytest.approx(patience)


@pytest.mark.parametrize(
    ("longest", "patience"), [(None, DEFAULT_TIMEOUT_S), (0.01, DEFAULT_TIMEOUT_S), (2.0, 40.0), (60.0, MAX_TIMEOUT_S)]
)
def test_patience_with_a_server_that_reads_other_prompts(longest: float | None, patience: float) -> None:
    assert silence_timeout_s(longest, reads_prompts=True) == pytest.approx(patience)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_who_was_slower_is_given_no_less_time(one: float, other: float) -> None:
    assert silence_timeout_s(min(one, other)) <= silence_timeout_s(max(one, other))


def test_pauses_are_known_by_node_and_model() -> None:
    pauses = PauseTracker()
    pauses.learn("a", "m", 0.5)
    assert pauses.longest_s("a", "m") == 0.5
    assert pauses.longest_s("a", "other") is None
    assert pauses.longest_s("b", "m") is None


def test_the_longest_counts_and_an_outlier_is_forgotten() -> None:
    pauses = PauseTracker()
    pauses.learn("a", "m", 4.0)
    pauses.learn("a", "m", 0.1)
    first = pauses.longest_s("a", "m")
    assert first is not None
    assert 3.0 < first < 4.0
    for _ in range(60):
        pauses.learn("a", "m", 0.1)
    assert pauses.longest_s("a", "m") == pytest.approx(0.1)
    pauses.learn("a", "m", 2.0)
    assert pauses.longest_s("a", "m") == 2.0


def test_memory_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence_watch, "MAX_TRACKED", 2)
    pauses = PauseTracker()
    for name in ("a", "b", "a", "c"):
        pauses.learn(name, "m", 1.0)
    assert pauses.longest_s("b", "m") is None
    assert pauses.longest_s("a", "m") == 1.0
    assert pauses.longest_s("c", "m") == 1.0
