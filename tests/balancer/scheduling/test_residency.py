"""What a request has to be equal in to need no load, and what a load pushes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.base import ResidencyKey
from gpumesh.balancer.models.residency import REPORT_LAG_S, SURPRISE_S, UNCONFIRMED_S, Residency
from tests.balancer.scheduling.fleets import KEY_A, KEY_B, KEY_C, NOW, A, B, C

LONG_AGO = NOW - 500.0
KEY_A_8K, KEY_A_32K = ResidencyKey(A, 8192), ResidencyKey(A, 32768)


def in_memory(*models: str, sizes: int | None = 1200, memory_mib: int | None = None) -> Residency:
    """A server with these models in memory, the first of them used longest ago."""
    residency = Residency()
    residency.memory_mib = memory_mib
    for seconds, model in enumerate(models):
        residency.replace_with_report(
            {**dict.fromkeys(residency.loaded, (sizes, None)), model: (sizes, None)}, asked_at=LONG_AGO + seconds
        )
        residency.note_use(model, LONG_AGO + seconds)
    return residency


# -- what is resident --------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_in_memory_must_be_loaded() -> None:
    residency = in_memory(A)
    assert residency.is_resident(KEY_A)
    assert not residency.is_resident(KEY_B)


def test_a_server_that_loads_nothing_has_all_its_models() -> None:
    assert Residency(is_tracked=False).is_resident(ResidencyKey(A, 8192, (("num_gpu", 3),)))


@pytest.mark.parametrize("option", ["main_gpu", "num_batch", "num_gpu", "num_thread", "use_mmap"])
def test_an_option_with_another_value_makes_the_server_load_again(option: str) -> None:
    residency = Residency()
    key = ResidencyKey(A, 8192, ((option, 1),))
    residency.note_sent(key, (), now=NOW, load_s=4.0)
    assert residency.is_resident(key)
    assert not residency.is_resident(ResidencyKey(A, 8192, ((option, 2),)))
    assert not residency.is_resident(ResidencyKey(A, 8192))


def test_a_model_that_others_have_loaded_has_no_options_of_ours() -> None:
    residency = in_memory(A)
    assert not residency.is_resident(ResidencyKey(A, None, (("num_gpu", 3),)))


def test_another_context_makes_the_server_load_again() -> None:
    residency = Residency()
    residency.note_sent(KEY_A_8K, (), now=NOW, load_s=4.0)
    assert residency.is_resident(KEY_A_8K)
    assert not residency.is_resident(KEY_A_32K)
    assert not residency.is_resident(KEY_A)


def test_a_model_that_others_have_loaded_serves_requests_for_its_context() -> None:
    residency = Residency()
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW)
    assert residency.is_resident(KEY_A_8K)
    assert not residency.is_resident(KEY_A_32K)


def test_while_no_context_is_known_the_model_counts_as_loaded_with_any() -> None:
    residency = in_memory(A)
    assert residency.is_resident(KEY_A_8K)


def test_a_context_that_the_server_cut_is_learned() -> None:
    """Ollama grants at most the context that the model was trained with."""
    residency = Residency()
    residency.note_sent(KEY_A_32K, (), now=NOW, load_s=4.0)
    residency.note_answer(KEY_A_32K, NOW + 4.0)
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW + 10.0)
    assert residency.is_resident(KEY_A_32K)
    assert residency.is_resident(KEY_A_8K), "it is what the model was loaded with"
    # After a restart of the server, others load the model with the same context.
    residency.replace_with_report({}, asked_at=NOW + 100.0)
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW + 110.0)
    assert residency.is_resident(KEY_A_32K)
    residency.replace_with_report({A: (1200, 32768)}, asked_at=NOW + 120.0)
    assert not residency.is_resident(KEY_A_32K), "a request for it would be granted 8,192 again"


def test_the_context_of_requests_that_ask_for_none_is_learned() -> None:
    residency = Residency()
    residency.note_sent(KEY_A, (), now=NOW, load_s=4.0)
    residency.note_answer(KEY_A, NOW + 4.0)
    residency.replace_with_report({A: (1200, 4096)}, asked_at=NOW + 10.0)
    assert residency.is_resident(KEY_A)
    assert residency.is_resident(ResidencyKey(A, 4096))
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW + 20.0)
    assert not residency.is_resident(KEY_A), "somebody has loaded it with another context"


def test_the_default_is_learned_although_the_model_was_loaded_with_another_context_before() -> None:
    """Two clients, one of which asks for 8,192. While the default is not known, it might be 8,192."""
    residency = Residency()
    residency.note_sent(KEY_A_8K, (), now=NOW, load_s=4.0)
    residency.note_answer(KEY_A_8K, NOW + 4.0)
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW + 10.0)
    assert residency.is_resident(KEY_A), "perhaps"
    residency.note_answer(KEY_A, NOW + 20.0)  # the server has loaded it anew
    residency.replace_with_report({A: (1200, 4096)}, asked_at=NOW + 30.0)
    assert not residency.is_resident(KEY_A_8K)
    residency.note_sent(KEY_A_8K, (A,), now=NOW + 40.0, load_s=4.0)
    residency.note_answer(KEY_A_8K, NOW + 44.0)
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW + 50.0)
    assert not residency.is_resident(KEY_A)


def test_a_report_of_another_context_shows_that_others_have_loaded_the_model_anew() -> None:
    residency = Residency()
    residency.note_sent(KEY_A_8K, (), now=NOW, load_s=4.0)
    residency.note_answer(KEY_A_8K, NOW + 4.0)
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW + 10.0)
    residency.replace_with_report({A: (1200, 32768)}, asked_at=NOW + 20.0)
    assert residency.is_resident(KEY_A_32K)
    assert not residency.is_resident(KEY_A_8K)


def test_an_answer_shows_with_which_context_the_model_is_loaded() -> None:
    residency = in_memory(A)
    residency.note_answer(KEY_A_8K, NOW)
    assert residency.is_resident(KEY_A_8K)
    assert not residency.is_resident(KEY_A_32K)
    residency.note_answer(KEY_A_32K, NOW + 5.0)
    assert residency.is_resident(KEY_A_32K)
    assert not residency.is_resident(KEY_A_8K)


# -- loads -------------------------------------------------------------------------------------------------------------


def test_a_load_counts_as_soon_as_it_is_sent_and_what_it_pushes_out_does_not() -> None:
    residency = in_memory(A)
    residency.note_sent(KEY_B, (A,), now=NOW, load_s=4.0)
    assert residency.is_resident(KEY_B)
    assert not residency.is_resident(KEY_A)
    assert residency.load_ends_at(B) == NOW + 4.0
    residency.note_answer(KEY_B, NOW + 3.0)
    assert residency.load_ends_at(B) is None
    assert residency.loaded[B].loaded_at == NOW + 3.0


def test_loads_come_one_at_a_time() -> None:
    residency = Residency()
    assert residency.next_load_starts_at(NOW) == NOW
    residency.note_sent(KEY_A, (), now=NOW, load_s=4.0)
    assert residency.next_load_starts_at(NOW) == NOW + 4.0
    residency.note_answer(KEY_A, NOW + 3.0)
    assert residency.next_load_starts_at(NOW + 3.0) == NOW + 3.0


def test_a_failed_load_leaves_nothing() -> None:
    residency = Residency()
    residency.note_sent(KEY_A, (), now=NOW, load_s=4.0)
    residency.note_failed_load(A)
    assert not residency.is_resident(KEY_A)
    assert residency.next_load_starts_at(NOW + 1.0) == NOW + 1.0


def test_an_answer_of_a_model_that_is_being_unloaded_does_not_bring_it_back() -> None:
    """The load of B waits for the end of A's requests, whose answers still come."""
    residency = in_memory(A)
    residency.note_sent(KEY_B, (A,), now=NOW, load_s=4.0)
    residency.note_answer(KEY_A, NOW + 1.0)
    assert not residency.is_resident(KEY_A)
    residency.note_answer(KEY_A, NOW + 10.0)
    assert residency.is_resident(KEY_A), "now nothing loads, so the model is in memory"


# -- what a load pushes out --------------------------------------------------------------------------------------------


def test_an_empty_server_unloads_nothing() -> None:
    assert Residency().pushed_out_by(KEY_A, {}) == ()


def test_a_load_with_other_options_pushes_out_the_model_itself() -> None:
    residency = in_memory(A, B, memory_mib=24_000)
    assert residency.pushed_out_by(KEY_A_8K, {}) == (A,)


def test_what_fits_pushes_out_nothing() -> None:
    residency = in_memory(A, B, memory_mib=3600)
    residency.file_mib = {C: 1000}  # about 1,200 MiB in memory
    assert list(residency.pushed_out_by(KEY_C, {})) == []
    residency.memory_mib = 3599
    assert list(residency.pushed_out_by(KEY_C, {})) == [A]


def test_what_was_not_used_for_longest_goes_first() -> None:
    residency = in_memory(A, B, memory_mib=2400)
    residency.file_mib = {C: 1000}
    assert list(residency.pushed_out_by(KEY_C, {})) == [A]
    residency.note_use(A, NOW)
    assert list(residency.pushed_out_by(KEY_C, {})) == [B]


def test_a_model_with_running_requests_goes_last() -> None:
    residency = in_memory(A, B, memory_mib=2400)
    residency.file_mib = {C: 1000}
    assert list(residency.pushed_out_by(KEY_C, {A: 1})) == [B]
    residency.file_mib = {C: 1900}
    assert list(residency.pushed_out_by(KEY_C, {A: 1})) == [B, A], "a model that takes all memory pushes out all"


def test_while_sizes_are_not_known_as_many_models_fit_as_were_seen_together() -> None:
    residency = in_memory(A, sizes=None)
    assert list(residency.pushed_out_by(KEY_B, {})) == [A]
    residency = in_memory(A, B, sizes=None)
    assert list(residency.pushed_out_by(KEY_C, {})) == [A]
    residency.replace_with_report({A: (None, None)}, asked_at=NOW)
    assert list(residency.pushed_out_by(KEY_C, {})) == [], "two were in memory together before"


def test_what_was_in_memory_together_fits_even_if_the_memory_is_not_known() -> None:
    residency = in_memory(A, B, sizes=1200)
    residency.replace_with_report({A: (1200, None)}, asked_at=NOW)
    assert list(residency.pushed_out_by(KEY_B, {})) == []
    residency.file_mib = {C: 2000}
    assert list(residency.pushed_out_by(KEY_C, {})) == [A]


# -- reports -----------------------------------------------------------------------------------------------------------


def test_a_limit_of_the_number_of_models_is_learned_from_a_load_that_pushed_out_what_would_fit() -> None:
    residency = in_memory(A, memory_mib=24000)
    residency.file_mib = dict.fromkeys((A, B, C), 1000)
    assert residency.pushed_out_by(KEY_B, {}) == []
    residency.note_sent(KEY_B, (), now=NOW, load_s=2.0)
    assert residency.replace_with_report({B: (1200, None)}, asked_at=NOW + 3.0) == [A]
    assert residency.pushed_out_by(KEY_C, {}) == [B]
    residency.replace_with_report({A: (1200, None), B: (1200, None)}, asked_at=NOW + 60.0)
    assert residency.pushed_out_by(KEY_C, {}) == [], "somebody has raised the limit"


def test_a_model_that_is_unloaded_later_shows_no_limit() -> None:
    residency = in_memory(A, memory_mib=24000)
    residency.file_mib = dict.fromkeys((A, B, C), 1000)
    residency.note_sent(KEY_B, (), now=NOW, load_s=2.0)
    residency.replace_with_report({A: (1200, None), B: (1200, None)}, asked_at=NOW + 3.0)
    assert residency.replace_with_report({B: (1200, None)}, asked_at=NOW + SURPRISE_S + 1.0) == [A]
    assert residency.pushed_out_by(KEY_C, {}) == []


def test_a_report_takes_away_what_the_server_has_unloaded() -> None:
    residency = in_memory(A, B)
    assert residency.replace_with_report({B: (1200, None)}, asked_at=NOW) == [A]
    assert not residency.is_resident(KEY_A)
    assert residency.is_resident(KEY_B)


def test_a_report_that_is_older_than_the_load_leaves_it() -> None:
    residency = in_memory(A)
    residency.note_sent(KEY_B, (A,), now=NOW, load_s=4.0)
    assert residency.replace_with_report({A: (1200, None)}, asked_at=NOW - 0.5) == []
    assert residency.is_resident(KEY_B)


def test_a_load_that_is_awaited_is_not_in_the_list_yet() -> None:
    residency = Residency()
    residency.note_sent(KEY_B, (), now=NOW, load_s=4.0)
    assert residency.replace_with_report({}, asked_at=NOW + 60.0) == []
    assert residency.is_resident(KEY_B)
    assert residency.replace_with_report({}, asked_at=NOW + UNCONFIRMED_S + 1.0) == [B]
    assert not residency.is_resident(KEY_B)


def test_an_answer_that_is_newer_than_the_report_counts() -> None:
    residency = Residency()
    residency.note_answer(KEY_A, NOW)
    assert residency.replace_with_report({}, asked_at=NOW + REPORT_LAG_S / 2.0) == []
    assert residency.replace_with_report({}, asked_at=NOW + REPORT_LAG_S * 2.0) == [A]


def test_a_report_from_before_a_load_with_another_context_shows_the_old_runner() -> None:
    residency = Residency()
    residency.replace_with_report({A: (1200, 8192)}, asked_at=LONG_AGO)
    residency.note_sent(KEY_A_32K, (A,), now=NOW, load_s=4.0)
    residency.replace_with_report({A: (1200, 8192)}, asked_at=NOW - 0.5)
    assert residency.is_resident(KEY_A_32K)
    assert not residency.is_resident(KEY_A_8K)
    residency.note_answer(KEY_A_32K, NOW + 4.0)
    residency.replace_with_report({A: (4000, 32768)}, asked_at=NOW + 10.0)
    assert residency.is_resident(KEY_A_32K)
    assert residency.loaded[A].size_mib == 4000


keys = st.builds(
    ResidencyKey,
    st.sampled_from([A, B, C]),
    st.sampled_from([None, 4096, 8192]),
    st.sampled_from([(), (("num_gpu", 1),)]),
)
reports = st.dictionaries(
    st.sampled_from([A, B, C]),
    st.tuples(st.none() | st.integers(0, 1 << 40), st.sampled_from([None, 4096, 8192])),
)


@given(
    st.lists(st.tuples(st.sampled_from(["send", "answer", "use", "report", "fail"]), keys, reports, st.floats(0, 200))),
    st.none() | st.integers(0, 1 << 20),
)
def test_whatever_happens_what_was_sent_or_answered_last_is_resident_and_a_load_pushes_out_what_is_there(
    events: list[tuple[str, ResidencyKey, dict[str, tuple[int | None, int | None]], float]], memory_mib: int | None
) -> None:
    residency = Residency()
    residency.memory_mib = memory_mib
    pushed_out_so_far: set[str] = set()
    now = NOW
    for event, key, report, seconds in events:
        now += seconds
        if event == "send":
            pushed_out = residency.pushed_out_by(key, {})
            assert set(pushed_out) <= set(residency.loaded)
            assert len(set(pushed_out)) == len(pushed_out)
            pushed_out_so_far |= set(pushed_out)
            residency.note_sent(key, pushed_out, now=now, load_s=seconds)
            assert residency.is_resident(key)
            assert not any(residency.is_resident(ResidencyKey(name)) for name in pushed_out if name != key.model)
        elif event == "answer":
            was_there = key.model in residency.loaded
            residency.note_answer(key, now)
            assert residency.is_resident(key) or not was_there
        elif event == "use":
            residency.note_use(key.model, now)
        elif event == "report":
            before = set(residency.loaded)
            gone = residency.replace_with_report(report, asked_at=now - seconds)
            after = set(residency.loaded)
            assert before - set(gone) <= after <= (before | set(report)) - set(gone)
            # The list may still hold what a load pushes out. Nothing else is left out.
            assert set(report) - after <= pushed_out_so_far
            assert not set(gone) & set(report)
        else:
            residency.note_failed_load(key.model)
        assert all(item.loaded_at <= now for item in residency.loaded.values())


def test_a_model_that_was_unloaded_on_request_is_gone_until_a_later_list_has_it() -> None:
    residency = in_memory(A, B)
    residency.note_answer(KEY_A, NOW)
    residency.note_unloaded(A, NOW)
    assert not residency.is_resident(KEY_A)
    assert residency.is_resident(KEY_B)
    reported: dict[str, tuple[int | None, int | None]] = {A: (1200, None), B: (1200, None)}
    residency.replace_with_report(reported, asked_at=NOW)
    assert not residency.is_resident(KEY_A), "the list may be from before"
    residency.replace_with_report(reported, asked_at=NOW + REPORT_LAG_S + 0.1)
    assert residency.is_resident(KEY_A), "a running request keeps it there"
