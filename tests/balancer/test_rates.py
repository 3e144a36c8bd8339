import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.rates import ServiceRates
from gpumesh.balancer.rates.rate_fits import MAX_SHARE, MAX_STEP, MAX_TOKEN_S, MIN_SAMPLES_SLOW, MIN_TOKEN_S, SHARE_STEP
from gpumesh.balancer.rates.service_rates import DEFAULT_LOAD_S, MAX_MODELS

MODEL = "m:latest"


def answer(rates: ServiceRates, token_s: float, streams: float = 1.0, *, tokens: int = 100, model: str = MODEL) -> None:
    rates.learn(model, tokens=tokens, eval_s=token_s * tokens, mean_streams=streams)


def serve(rates: ServiceRates, t1: float, share: float, *, answers: int = 200, seed: int = 1) -> None:
    """Answers of a synthetic server, with 1 to 8 streams and a noise of 2 %."""
    rng = Random(seed)
    for _ in range(answers):
        streams = rng.uniform(1.0, 8.0)
        answer(rates, t1 * (1.0 + share * (streams - 1.0)) * rng.uniform(0.98, 1.02), streams)


# -- decoding --------------------------------------------------------------------------------------------------------


@given(t1=st.floats(1e-4, 1.0), share=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_rate_and_share_of_a_synthetic_server_are_recovered(t1: float, share: float, seed: int) -> None:
    rates = ServiceRates()
    serve(rates, t1, share, seed=seed)
    assert rates.decode_s(MODEL, 1.0) == pytest.approx(t1, rel=0.05)
    for streams in (1, 2, 4, 8):
        expected = 100 * t1 * (1.0 + share * (streams - 1))
        assert rates.decode_s(MODEL, 100, streams) == pytest.approx(expected, rel=0.05)
    assert rates.share(MODEL) == pytest.approx(share, abs=0.05)


def test_the_rate_is_cleaned_of_concurrency() -> None:
    """All answers came among four streams, and yet the rate of a lone stream is about right."""
    rates = ServiceRates()
    for _ in range(20):
        answer(rates, 0.016, 4.0)
    assert rates.decode_s(MODEL, 1) == pytest.approx(0.010, rel=0.01)
    assert rates.decode_s(MODEL, 1, 4) == pytest.approx(0.016, rel=0.01)


def test_a_node_that_becomes_slower_or_faster_is_followed() -> None:
    for factor in (0.1, 0.5, 3.0, 20.0):
        rates = ServiceRates()
        serve(rates, 0.01, 0.2)
        serve(rates, 0.01 * factor, 0.2, answers=40)
        assert rates.decode_s(MODEL, 1) == pytest.approx(0.01 * factor, rel=0.1)


@pytest.mark.parametrize("lie_s", [1e-5, 1e-3, 0.5, 60.0])
def test_one_lie_hardly_moves_what_is_known(lie_s: float) -> None:
    rates = ServiceRates()
    serve(rates, 0.01, 0.2)
    before = rates.decode_s(MODEL, 1)
    answer(rates, lie_s, 4.0)
    assert rates.decode_s(MODEL, 1) == pytest.approx(before, rel=0.1)
    assert rates.decode_s(MODEL, 1, 8) == pytest.approx(before * 2.4, rel=0.1)


def test_a_first_lie_is_soon_forgotten() -> None:
    for lie_s in (MIN_TOKEN_S, 10.0):
        rates = ServiceRates()
        answer(rates, lie_s)
        serve(rates, 0.01, 0.2, answers=60)
        assert rates.decode_s(MODEL, 1) == pytest.approx(0.01, rel=0.1)


_LIES = st.tuples(
    st.one_of(st.integers(-5, 10**10), st.none()),
    st.one_of(st.floats(), st.none()),
    st.floats(),
)


@given(st.lists(_LIES, max_size=40))
def test_any_figures_keep_the_rates_within_their_bounds(lies: list[tuple[int | None, float | None, float]]) -> None:
    rates = ServiceRates()
    answer(rates, 0.01)
    for tokens, seconds, streams in lies:
        before, share = rates.decode_s(MODEL, 1), rates.share(MODEL)
        rates.learn(
            MODEL,
            tokens=tokens,
            eval_s=seconds,
            mean_streams=streams,
            unread_tokens=tokens,
            prompt_s=seconds,
            mean_prefills=streams,
            load_s=seconds,
        )
        rates.learn_from_clock(
            MODEL, tokens=tokens, stream_s=seconds, mean_streams=streams, unread_tokens=tokens, ttft_s=seconds
        )
        after = rates.decode_s(MODEL, 1)
        assert MIN_TOKEN_S <= after <= MAX_TOKEN_S
        assert before / MAX_STEP**2 * 0.999 <= after <= before * MAX_STEP**2 * 1.001
        assert 0.0 <= rates.share(MODEL) <= MAX_SHARE
        assert abs(rates.share(MODEL) - share) <= 2 * SHARE_STEP + 1e-9
        assert math.isfinite(rates.prefill_s(MODEL, 1000))
        assert 0.2 <= rates.load_s(MODEL) <= 3600.0
    ServiceRates().restore(rates.as_dict())


@pytest.mark.parametrize(
    "figures",
    [
        {"tokens": 3, "eval_s": 1.0},
        {"tokens": 100, "eval_s": 0.0},
        {"tokens": 100, "eval_s": -1.0},
        {"tokens": 100, "eval_s": math.nan},
        {"tokens": 100, "eval_s": math.inf},
        {"tokens": 100, "eval_s": 1e-9},
        {"tokens": -100, "eval_s": 1.0},
        {"tokens": 100, "eval_s": 1.0, "mean_streams": math.nan},
        {"tokens": 100, "eval_s": 1.0, "mean_streams": 1e9},
        {"tokens": 100, "eval_s": 1.0, "mean_streams": -1.0},
        {"tokens": None, "eval_s": 1.0},
        {"unread_tokens": 5, "prompt_s": 1.0},
        {"unread_tokens": 500, "prompt_s": math.nan},
        {"unread_tokens": 500, "prompt_s": 0.0},
        {"unread_tokens": 500, "prompt_s": 1e9},
        {"load_s": 0.05},
        {"load_s": math.inf},
        {"load_s": math.nan},
    ],
)
def test_nonsense_is_ignored(figures: dict[str, Any]) -> None:
    rates = ServiceRates()
    rates.learn(MODEL, **figures)
    assert rates.as_dict() == ServiceRates().as_dict()
    assert not rates.is_measured(MODEL)


def test_a_node_that_lost_half_of_its_rate_is_slow_now() -> None:
    rates = ServiceRates()
    assert not rates.is_slow_now(MODEL)
    serve(rates, 0.01, 0.2, answers=MIN_SAMPLES_SLOW)
    assert not rates.is_slow_now(MODEL)
    answer(rates, 0.5)
    assert not rates.is_slow_now(MODEL), "one bad answer"
    for _ in range(3):
        answer(rates, 0.03)
    assert rates.is_slow_now(MODEL)
    for _ in range(10):
        answer(rates, 0.01)
    assert not rates.is_slow_now(MODEL)


def test_neighbours_do_not_make_a_node_slow() -> None:
    rates = ServiceRates()
    for _ in range(20):
        answer(rates, 0.01)
    for _ in range(20):
        answer(rates, 0.01 * (1 + 0.2 * 15), 16.0)
        assert not rates.is_slow_now(MODEL)


# -- prompts and loads -----------------------------------------------------------------------------------------------


def test_the_prefill_rate_is_that_of_long_prompts() -> None:
    rates = ServiceRates()
    for tokens in (20, 4000, 30, 2000, 25):
        rates.learn(MODEL, unread_tokens=tokens, prompt_s=0.02 + tokens / 2000)
    assert rates.prefill_s(MODEL, 2000) == pytest.approx(1.0, rel=0.05)


def test_a_lie_about_a_prompt_moves_the_rate_by_a_bounded_factor() -> None:
    rates = ServiceRates()
    for _ in range(20):
        rates.learn(MODEL, unread_tokens=1000, prompt_s=0.5)
    rates.learn(MODEL, unread_tokens=100_000_000, prompt_s=100.0)
    rates.learn(MODEL, unread_tokens=2000, prompt_s=2000.0)
    assert rates.prefill_s(MODEL, 1000) == pytest.approx(0.5, rel=0.1)


def test_what_a_neighbour_takes_is_expected_to_be_as_on_the_other_nodes() -> None:
    fleet = ServiceRates()
    first, second = ServiceRates(fleet), ServiceRates(fleet)
    serve(first, 0.01, 0.0)
    answer(second, 0.02, 1.0)  # a lone stream shows nothing of neighbours
    assert second.share(MODEL) == pytest.approx(0.0, abs=0.02)
    serve(second, 0.02, 0.5)
    assert second.share(MODEL) == pytest.approx(0.5, abs=0.05)  # its own answers outweigh those of others
    assert first.share(MODEL) == pytest.approx(0.0, abs=0.05)


def test_prompts_that_were_read_together_share_the_gpu() -> None:
    rates = ServiceRates()
    rates.learn(MODEL, unread_tokens=2000, prompt_s=2.0, mean_prefills=2.0)
    assert rates.prefill_s(MODEL, 2000) == pytest.approx(1.0)


def test_a_load_that_waited_for_others_counts_less() -> None:
    rates = ServiceRates()
    rates.learn(MODEL, load_s=4.0)
    rates.learn(MODEL, load_s=9.0)
    assert rates.load_s(MODEL) == pytest.approx(4.6)
    rates.learn(MODEL, load_s=4.0)
    assert rates.load_s(MODEL) == pytest.approx(4.3)


def test_the_own_clock_counts_less_than_the_servers_figures() -> None:
    rates = ServiceRates()
    rates.learn_from_clock(MODEL, tokens=101, stream_s=1.0, unread_tokens=1000, ttft_s=0.5)
    assert rates.decode_s(MODEL, 100) == pytest.approx(1.0)
    assert rates.prefill_s(MODEL, 1000) == pytest.approx(0.5)
    rates.learn_from_clock(MODEL, tokens=101, stream_s=1.0, unread_tokens=1000, ttft_s=30.0)  # it has waited
    assert rates.prefill_s(MODEL, 1000) < 0.7
    for _ in range(5):
        answer(rates, 0.02)
    assert rates.decode_s(MODEL, 100) > 1.7


# -- fallbacks -------------------------------------------------------------------------------------------------------


def test_without_data_the_constants_answer() -> None:
    rates = ServiceRates()
    assert rates.decode_s(MODEL, 60) == pytest.approx(1.0)
    assert rates.decode_s(MODEL, 60, 2.0) == pytest.approx(1.2)
    assert rates.prefill_s(MODEL, 1200) == pytest.approx(1.0)
    assert rates.load_s(MODEL) == DEFAULT_LOAD_S
    fresh = ServiceRates(fallback=rates)
    assert fresh.decode_s(MODEL, 60) == pytest.approx(1.0)
    assert fresh.share(MODEL) == 0.2


def test_the_same_model_elsewhere_is_asked_before_another_model_here() -> None:
    fleet = ServiceRates()
    node = ServiceRates(fallback=fleet)
    figures: dict[str, Any] = {"tokens": 100, "unread_tokens": 1000, "prompt_s": 1.0}
    node.learn("other:latest", eval_s=1.0, load_s=2.0, **figures)
    assert node.decode_s(MODEL, 100) == pytest.approx(1.0), "another model here"
    assert (node.prefill_s(MODEL, 1000), node.load_s(MODEL)) == (1.0, 2.0)
    fleet.learn(MODEL, eval_s=5.0, load_s=7.0, **figures | {"prompt_s": 3.0})
    assert node.decode_s(MODEL, 100) == pytest.approx(5.0), "the same model elsewhere"
    assert (node.prefill_s(MODEL, 1000), node.load_s(MODEL)) == (3.0, 7.0)
    node.learn(MODEL, eval_s=8.0, load_s=9.0, **figures | {"prompt_s": 2.0})
    assert node.decode_s(MODEL, 100) == pytest.approx(8.0), "the model itself"
    assert (node.prefill_s(MODEL, 1000), node.load_s(MODEL)) == (2.0, 9.0)
    assert ServiceRates(fallback=fleet).decode_s("third:latest", 100) == pytest.approx(5.0)


def test_the_prefill_of_a_model_that_was_only_seen_decoding_follows_from_its_rate() -> None:
    rates = ServiceRates()
    answer(rates, 0.1)
    assert rates.prefill_s(MODEL, 20) == pytest.approx(0.1)


# -- storing ---------------------------------------------------------------------------------------------------------


def test_rates_survive_being_stored() -> None:
    rates = ServiceRates()
    serve(rates, 0.01, 0.4)
    rates.learn(MODEL, unread_tokens=1000, prompt_s=0.5, load_s=5.0)
    again = ServiceRates()
    again.restore(rates.as_dict())
    assert again.as_dict() == rates.as_dict()
    for streams in (1, 8):
        assert again.decode_s(MODEL, 10, streams) == pytest.approx(rates.decode_s(MODEL, 10, streams))
    serve(again, 0.02, 0.1, answers=60)
    assert again.decode_s(MODEL, 1, 4) == pytest.approx(0.02 * 1.3, rel=0.05), "new answers outweigh it"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"more": 1},
        {"decode": {"m": {"token_s": 0.01}}},
        {"decode": {"m": {"token_s": math.nan, "share": 0.2}}},
        {"decode": {"m": {"token_s": 0.0, "share": 0.2}}},
        {"decode": {"m": {"token_s": 0.01, "share": -1.0}}},
        {"decode": {"m": {"token_s": "0.01", "share": 0.1}}},
        {"prefill": {"m": math.inf}},
        {"prefill": {"m": 0.0}},
        {"load": {"m" * 500: 1.0}},
        {"load": []},
    ],
)
def test_a_damaged_document_is_refused(changes: dict[str, object]) -> None:
    document = {**ServiceRates().as_dict(), **changes}
    with pytest.raises(ValueError):
        ServiceRates().restore(document)


def test_stored_rates_do_not_replace_what_was_measured_since() -> None:
    stored, rates = ServiceRates(), ServiceRates()
    assert rates.is_empty
    figures: dict[str, Any] = {"tokens": 100, "unread_tokens": 1000, "prompt_s": 1.0}
    for model in (MODEL, "other:latest", "", "m" * 500):
        stored.learn(model, eval_s=1.0, load_s=3.0, **figures)
    rates.learn(MODEL, eval_s=2.0, load_s=6.0, **figures | {"prompt_s": 2.0})
    rates.restore(stored.as_dict())
    assert not rates.is_empty
    assert (rates.decode_s(MODEL, 100), rates.prefill_s(MODEL, 1000), rates.load_s(MODEL)) == (2.0, 2.0, 6.0)
    assert (rates.decode_s("", 100), rates.prefill_s("", 1000), rates.load_s("")) == pytest.approx((1.0, 1.0, 3.0))
    assert not rates.is_measured("m" * 500), "the name is too long to be stored"


def test_the_models_of_a_node_are_bounded() -> None:
    rates = ServiceRates()
    for number in range(MAX_MODELS + 5):
        answer(rates, 0.01, model=f"{number}:latest")
    assert not rates.is_measured("0:latest")
    assert rates.is_measured(f"{MAX_MODELS + 4}:latest")
    assert "tokens/s" in repr(rates)


def test_the_pace_is_what_the_single_questions_say_before_and_after_each_answer() -> None:
    fleet = ServiceRates()
    rates, other = ServiceRates(fleet), ServiceRates(fleet)
    for number in range(4):
        for node in (other, rates) if number else (other,):
            answer(node, 0.01 * (number + 1))
            answer(fleet, 0.01 * (number + 1))
            node.learn(MODEL, unread_tokens=1000, prompt_s=0.1 * (number + 1))
        for node in (rates, other, fleet):
            pace = node.pace(MODEL)
            assert pace.token_s == pytest.approx(node.decode_s(MODEL, 1.0))
            assert pace.share == node.share(MODEL)
            assert pace.read_token_s == pytest.approx(node.prefill_s(MODEL, 1.0))
