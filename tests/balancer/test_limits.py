import heapq
import math
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.balancer.limits import NodeSlots, ParallelLimit, SentRequest, SlotSearch, learn_limit
from gpumesh.balancer.limits.node_slots import MAX_MODELS
from gpumesh.balancer.limits.parallel_limit import (
    CEILING_ANSWERS,
    CEILING_S,
    MOST_PROVEN,
    UNCLEAR_TRIALS,
    on_first_token,
    on_sent,
    return_trials,
)

MODEL = "chat:latest"


@dataclass
class Server:
    """A server with so many slots that always gets as many requests as the limit allows, until all are sent.

    An answer takes ``prefill_s`` and ``decode_s``. The durations are the server's own; ``tells``: it sends them.
    """

    slots: int
    requests: int
    node: NodeSlots = field(default_factory=NodeSlots)
    prefill_s: float = 0.05
    decode_s: float = 1.0
    tells: bool = True
    streams: bool = True
    now: float = 0.0
    waited: int = 0
    most_in_flight: int = 0
    answered: int = 0
    in_flight_after: list[int] = field(default_factory=list)
    """The requests in flight after each answer, when others were sent."""
    jitter: Random | None = None
    """Makes the answers take different times."""

    @property
    def limit(self) -> ParallelLimit:
        return self.node.limit(MODEL)

    def run(self) -> "Server":
        events: list[tuple[float, int, str, SentRequest, float, float]] = []
        inside: list[tuple[SentRequest, float]] = []  # with the time of sending
        number = running = 0
        left = self.requests
        while True:
            while left and self.node.in_flight(MODEL) < self.node.max_in_flight(MODEL, self.now):
                left -= 1
                inside.append((self.node.note_sent(MODEL, self.now), self.now))
                self.most_in_flight = max(self.most_in_flight, self.node.in_flight(MODEL))
            if self.answered > len(self.in_flight_after):
                self.in_flight_after.append(self.node.in_flight(MODEL))
            while inside and running < self.slots:
                running += 1
                sent, sent_at = inside.pop(0)
                waited_s = self.now - sent_at
                self.waited += waited_s > 0
                number += 1
                heapq.heappush(events, (self.now + self.prefill_s, number, "first token", sent, sent_at, waited_s))
            if not events:
                return self
            self.now, _, kind, sent, sent_at, waited_s = heapq.heappop(events)
            if kind == "first token":
                if self.streams:
                    self.node.note_first_token(sent, self.now)
                duration_s = self.decode_s * (self.jitter.uniform(0.1, 2.0) if self.jitter else 1.0)
                number += 1
                heapq.heappush(events, (self.now + duration_s, number, "end", sent, sent_at, waited_s))
                continue
            running -= 1
            self.answered += 1
            total_ms = (self.now - sent_at) * 1000.0 if self.tells else None
            waited_ms = waited_s * 1000.0 if self.tells else None
            self.node.note_answer(sent, self.now, waited_ms=waited_ms, total_ms=total_ms, load_ms=None)


def learn(
    limit: ParallelLimit, waited_ms: float, *, concurrent: int, now: float, load_ms: float = 0.0
) -> ParallelLimit:
    total_ms = 2000.0 + waited_ms + load_ms
    return learn_limit(limit, waited_ms=waited_ms, total_ms=total_ms, load_ms=load_ms, concurrent=concurrent, now=now)


# -- slow start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("streams", [True, False])
def test_the_true_number_of_slots_is_found(slots: int, streams: bool) -> None:
    server = Server(slots, requests=slots * 12, streams=streams).run()
    assert server.limit.proven == slots
    assert server.limit.max_in_flight(server.now) == slots
    assert server.answered == slots * 12


def test_sixteen_streams_of_one_second_on_a_fresh_node_with_32_slots_end_soon() -> None:
    server = Server(32, requests=16).run()  # half of the 32 streams on two nodes
    assert server.now < 1.375
    assert server.waited == 0


def test_a_server_with_four_slots_is_used_in_full_after_five_answers() -> None:
    for streams in (True, False):
        server = Server(4, requests=40, streams=streams).run()
        assert server.in_flight_after[4] >= 4


def test_a_server_with_one_slot_gets_one_request_too_many_once() -> None:
    server = Server(1, requests=40).run()
    assert server.most_in_flight == 2
    assert server.waited == 1


@given(slots=st.integers(1, 40), prefill_s=st.floats(0.01, 2.0), decode_s=st.floats(0.2, 5.0), streams=st.booleans())
def test_slow_start_never_sends_more_than_twice_the_slots(
    slots: int, prefill_s: float, decode_s: float, streams: bool
) -> None:
    server = Server(slots, requests=slots * 30, prefill_s=prefill_s, decode_s=decode_s, streams=streams).run()
    assert server.most_in_flight <= 2 * slots
    assert server.waited <= 3 * slots
    assert 0.75 * slots <= server.limit.proven <= slots


def test_without_durations_the_first_tokens_are_enough() -> None:
    server = Server(8, requests=80, tells=False).run()
    assert server.limit.proven == 8
    assert server.waited <= 16


def test_answers_without_any_sign_teach_nothing() -> None:
    server = Server(4, requests=80, tells=False, streams=False).run()
    assert server.limit.proven == 1
    assert server.most_in_flight == 2


# -- after the number was learned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4, 32])
@pytest.mark.parametrize("decode_s", [0.2, 10.0, 60.0])
def test_at_most_one_of_50_requests_waits_once_the_number_is_known(slots: int, decode_s: float) -> None:
    known = Server(slots, requests=slots * 12, decode_s=decode_s).run()
    learned_at = known.now
    server = Server(slots, requests=2000, node=known.node, decode_s=decode_s, now=known.now).run()
    assert server.waited <= 2000 / 50
    assert server.waited <= (server.now - learned_at) / CEILING_S + 1
    assert server.limit.proven == slots


def test_one_more_is_tried_again_only_after_a_while_and_one_at_a_time() -> None:
    limit = ParallelLimit(proven=2, trials_left=0, search=SlotSearch.KNOWN, ceiling_until=CEILING_S)
    for _ in range(CEILING_ANSWERS - 1):
        limit = learn(limit, 0.0, concurrent=2, now=1.0)
    assert limit.max_in_flight(CEILING_S) == 2, "too few answers"
    limit = learn(limit, 0.0, concurrent=2, now=1.0)
    assert limit.max_in_flight(CEILING_S - 1.0) == 2, "too early"
    assert limit.max_in_flight(CEILING_S) == 3
    limit = on_sent(limit, in_flight=3, now=CEILING_S)
    assert limit.max_in_flight(CEILING_S + 1.0) == 2, "the result of this trial is awaited"
    limit = on_first_token(limit, streaming=3)
    assert limit.proven == 3
    assert limit.max_in_flight(CEILING_S + 2.0) == 4, "the server has become larger: the next one is tried at once"


def test_a_server_restarted_with_fewer_slots_is_noticed() -> None:
    limit = ParallelLimit(proven=32, trials_left=0)
    for second in range(200):
        now = float(second)
        concurrent = min(limit.max_in_flight(now), 32)
        limit = learn(limit, 0.0 if concurrent <= 4 else 1500.0, concurrent=concurrent, now=now)
    assert limit.proven == 4


def test_a_server_restarted_with_more_slots_is_used_after_a_while() -> None:
    known = Server(2, requests=30).run()
    server = Server(8, requests=1300, node=known.node, now=known.now).run()
    assert server.limit.proven == 8


def test_many_requests_that_waited_together_shrink_the_limit_once() -> None:
    limit = ParallelLimit(proven=8, trials_left=0)
    for _ in range(8):  # other clients took the slots for a moment
        limit = learn(limit, 1500.0, concurrent=8, now=100.0)
    assert limit.proven == 7


# -- what shows nothing ----------------------------------------------------------------------------------------------


def test_the_time_of_a_load_is_no_waiting() -> None:
    limit = on_sent(ParallelLimit(), in_flight=2, now=0.0)
    assert limit.max_in_flight(1.0) == 1
    limit = learn(limit, 1500.0, concurrent=2, load_ms=4000.0, now=8.0)
    assert (limit.proven, limit.search) == (1, SlotSearch.DOUBLING)
    assert limit.max_in_flight(8.0) == 2, "the trial has shown nothing, so another one may be sent"
    assert learn(ParallelLimit(), 0.0, concurrent=2, load_ms=4000.0, now=8.0).proven == 1
    assert learn(ParallelLimit(), 0.0, concurrent=2, load_ms=30.0, now=8.0).proven == 2, "a model in memory"


def test_streams_after_a_load_show_how_many_run_together() -> None:
    """The requests are held until the model is in memory. Then their answers run at the same time."""
    node, now = NodeSlots(), 0.0
    first = [node.note_sent(MODEL, now) for _ in range(node.max_in_flight(MODEL, now))]
    for request in first:
        node.note_first_token(request, 4.1)
    assert node.max_in_flight(MODEL, 4.1) == 4
    for request in first:
        node.note_answer(request, 5.1, waited_ms=0.0, total_ms=5100.0, load_ms=4000.0)
    assert (node.limit(MODEL).proven, node.limit(MODEL).has_been_full) == (2, False)


def test_answers_in_one_piece_without_durations_are_no_trials() -> None:
    node = NodeSlots()
    for now in (0.0, 10.0, 20.0):
        assert node.max_in_flight(MODEL, now) == 2
        for request in [node.note_sent(MODEL, now), node.note_sent(MODEL, now)]:
            node.note_first_token(request, now + 5.0)  # all of the answer comes at its end
            node.note_answer(request, now + 5.001, waited_ms=None, total_ms=None, load_ms=None)
            assert node.limit(MODEL).proven == 1


def test_where_all_trials_are_unclear_a_known_number_stays() -> None:
    limit = ParallelLimit(proven=8, trials_left=1, search=SlotSearch.KNOWN, ceiling_until=0.0)
    for number in range(UNCLEAR_TRIALS):
        assert limit.max_in_flight(float(number)) == 9
        limit = on_sent(limit, in_flight=9, now=float(number))
        limit = learn_limit(limit, waited_ms=5.0, total_ms=100.0, concurrent=9, overlapping=6, now=float(number) + 0.1)
    assert limit.max_in_flight(10.0) == 8
    assert limit.max_in_flight(CEILING_S) == 8, "until more answers have come"


@pytest.mark.parametrize("slots", [1, 4, 8, 32])
@pytest.mark.parametrize("streams", [True, False])
def test_answers_of_different_lengths_show_the_number_too(slots: int, streams: bool) -> None:
    server = Server(slots, requests=slots * 30, decode_s=2.0, streams=streams, jitter=Random(slots)).run()
    assert server.limit.proven == slots
    assert server.limit.has_been_full
    assert server.waited <= 3 * slots


def test_a_trial_that_failed_or_was_cancelled_is_repeated() -> None:
    limit = on_sent(ParallelLimit(), in_flight=2, now=0.0)
    assert return_trials(limit, concurrent=1) == limit, "this was no trial"
    limit = return_trials(limit, concurrent=2)
    assert limit.max_in_flight(0.0) == 2
    assert return_trials(limit, concurrent=2).trials_left == 1


def test_all_trials_of_a_burst_that_has_shown_nothing_are_repeated() -> None:
    limit = ParallelLimit(proven=8, trials_left=2)
    unclear = learn_limit(limit, waited_ms=0.0, total_ms=40.0, concurrent=14, overlapping=5, trials=6, now=0.0)
    assert (unclear.proven, unclear.trials_left) == (8, 8)
    lost = learn_limit(limit, waited_ms=None, total_ms=None, concurrent=14, trials=4, now=0.0)
    assert (lost.proven, lost.trials_left) == (8, 6)


def test_a_wait_within_the_noise_of_a_long_answer_proves_nothing() -> None:
    limit = learn_limit(ParallelLimit(), waited_ms=400.0, total_ms=20_000.0, concurrent=2, now=0.0)
    assert limit == ParallelLimit()


def test_an_answer_without_durations_teaches_nothing() -> None:
    assert learn_limit(ParallelLimit(), waited_ms=None, total_ms=5.0, concurrent=9, now=0.0) == ParallelLimit()


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -1.0, -math.inf])
def test_nonsense_teaches_nothing(nonsense: float) -> None:
    start = ParallelLimit()
    assert learn_limit(start, waited_ms=nonsense, total_ms=5.0, concurrent=9, now=0.0) == start
    assert learn_limit(start, waited_ms=5.0, total_ms=nonsense, concurrent=9, now=0.0) == start


def test_no_server_gets_requests_without_bound() -> None:
    assert on_first_token(ParallelLimit(), streaming=10**9).proven == MOST_PROVEN
    assert learn(ParallelLimit(), 0.0, concurrent=10**9, now=0.0).proven == MOST_PROVEN


_SIGNS = st.tuples(
    st.sampled_from(["sent", "token", "answer", "void"]),
    st.integers(1, 64),
    st.one_of(st.none(), st.floats(0.0, 5000.0)),
    st.floats(0.0, 5000.0),
)


@given(st.lists(_SIGNS, max_size=60))
def test_any_signs_keep_the_limit_within_its_bounds(signs: list[tuple[str, int, float | None, float]]) -> None:
    limit, now = ParallelLimit(), 0.0
    for kind, count, waited_ms, load_ms in signs:
        now += 1.0
        if kind == "sent":
            limit = on_sent(limit, in_flight=count, now=now)
        elif kind == "token":
            limit = on_first_token(limit, streaming=count)
        elif kind == "void":
            limit = return_trials(limit, concurrent=count)
        else:
            total_ms = None if waited_ms is None else waited_ms + 500.0
            limit = learn_limit(
                limit, waited_ms=waited_ms, total_ms=total_ms, load_ms=load_ms, concurrent=count, now=now
            )
        assert 1 <= limit.proven <= 64
        assert 0 <= limit.trials_left <= limit.proven
        assert limit.proven <= limit.max_in_flight(now) <= 2 * limit.proven


# -- the limits of a node --------------------------------------------------------------------------------------------


def learned_slots() -> NodeSlots:
    node = NodeSlots()
    for request in [node.note_sent("chat:latest", 0.0) for _ in range(4)]:
        node.note_first_token(request, 0.1)
    first = node.note_sent("embed:latest", 0.0)
    second = node.note_sent("embed:latest", 0.0)
    node.note_answer(first, 1.0, waited_ms=0.0, total_ms=1000.0, load_ms=None)
    node.note_answer(second, 2.0, waited_ms=1000.0, total_ms=2000.0, load_ms=None)
    return node


def test_models_have_limits_of_their_own() -> None:
    node = learned_slots()
    assert node.max_in_flight("chat:latest", 2.0) == 8
    assert node.in_flight("chat:latest") == 4
    assert node.max_in_flight("embed:latest", 2.0) == 1
    assert node.max_in_flight("other:latest", 2.0) == 2
    assert node.in_flight("other:latest") == 0
    assert "chat:latest 4 of 4" in repr(node)
    assert "nothing" in repr(NodeSlots())


def test_a_cancelled_trial_is_repeated() -> None:
    node = NodeSlots()
    node.note_sent("m:latest", 0.0)
    trial = node.note_sent("m:latest", 0.0)
    assert node.max_in_flight("m:latest", 1.0) == 1
    node.note_unfinished(trial, 1.0)
    assert (node.in_flight("m:latest"), node.max_in_flight("m:latest", 1.0)) == (1, 2)


def test_an_end_that_is_seen_late_proves_nothing() -> None:
    """The answer had ended inside the server before the next request came there, or before the next answer began."""
    node = NodeSlots()
    first, second = node.note_sent("m:latest", 0.0), node.note_sent("m:latest", 5.0)
    node.note_answer(first, 5.05, waited_ms=0.0, total_ms=5000.0, load_ms=None)
    node.note_answer(second, 9.0, waited_ms=0.0, total_ms=4000.0, load_ms=None)
    assert node.limit("m:latest").proven == 1
    first, second = node.note_sent("n:latest", 0.0), node.note_sent("n:latest", 0.0)
    node.note_first_token(first, 0.1)
    node.note_first_token(second, 5.0)
    assert node.limit("n:latest").proven == 2
    node.note_answer(first, 5.01, waited_ms=0.0, total_ms=5000.0, load_ms=None)
    assert node.limit("n:latest").proven == 1


def test_the_models_of_a_node_are_bounded() -> None:
    node = NodeSlots()
    running = node.note_sent("running:latest", 0.0)
    for number in range(MAX_MODELS + 5):
        for request in [node.note_sent(f"{number}:latest", 0.0), node.note_sent(f"{number}:latest", 0.0)]:
            node.note_first_token(request, 1.0)
            node.note_answer(request, 2.0, waited_ms=0.0, total_ms=2000.0, load_ms=None)
    assert node.limit("0:latest").proven == 1
    assert node.limit(f"{MAX_MODELS + 4}:latest").proven == 2
    node.note_unfinished(running, 3.0)


def test_limits_survive_being_stored() -> None:
    node = NodeSlots()
    node.restore(learned_slots().as_dict(), now=1000.0)
    assert node.max_in_flight("chat:latest", 1000.0) == 8
    assert node.max_in_flight("embed:latest", 1000.0) == 1
    assert node.as_dict() == learned_slots().as_dict()


def test_a_model_whose_name_is_too_long_is_not_stored() -> None:
    node = NodeSlots()
    for model in ("m" * 500, ""):
        for request in [node.note_sent(model, 0.0), node.note_sent(model, 0.0)]:
            node.note_first_token(request, 0.1)
    assert node.as_dict() == {"": {"proven": 2, "search": "doubling"}}


def test_a_stored_limit_does_not_replace_what_was_seen_since() -> None:
    node = NodeSlots()
    node.note_sent("chat:latest", 1000.0)
    node.restore(learned_slots().as_dict(), now=1000.0)
    assert node.limit("chat:latest").proven == 1
    assert node.in_flight("chat:latest") == 1


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"m": {}},
        {"m": {"proven": 0, "search": "known"}},
        {"m": {"proven": 10**9, "search": "known"}},
        {"m": {"proven": 1.5, "search": "known"}},
        {"m": {"proven": True, "search": "known"}},
        {"m": {"proven": 1, "search": "other"}},
        {"m": {"proven": 1, "search": "known", "more": 1}},
        {"m" * 1000: {"proven": 1, "search": "known"}},
    ],
)
def test_a_damaged_document_is_refused(document: object) -> None:
    with pytest.raises(ValueError):
        NodeSlots().restore(document, now=0.0)
