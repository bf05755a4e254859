"""The token budget, the bounded queue before it, and its fairness between clients."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protos.errors import Overloaded
from teacher_server.admission import Admission, Ticket
from teacher_server.drain_rate import DrainRate


def granted(tickets: list[Ticket]) -> list[bool]:
    return [ticket.granted.is_set() for ticket in tickets]


def test_tickets_are_granted_in_order_within_the_budget() -> None:
    admission = Admission(10, 100)
    tickets = admission.admit([6, 4, 5, 1])
    # 6 + 4 fill the budget; 1 would not pass 5, which came first.
    assert granted(tickets) == [True, True, False, False]
    assert (admission.tokens_in_flight, admission.tokens_queued) == (10, 6)
    admission.release(tickets[1])
    assert granted(tickets) == [True, True, False, False]  # 6 + 5 > 10
    admission.release(tickets[0])
    assert granted(tickets) == [True, True, True, True]
    for ticket in tickets:
        admission.release(ticket)
    assert (admission.tokens_in_flight, admission.tokens_queued) == (0, 0)


def test_what_is_larger_than_the_budget_goes_alone() -> None:
    admission = Admission(5, 5)
    [large] = admission.admit([50])
    assert granted([large]) == [True]
    [next_one] = admission.admit([1])
    assert granted([next_one]) == [False]
    admission.release(large)
    assert granted([next_one]) == [True]


def test_a_waiting_ticket_can_be_given_back() -> None:
    admission = Admission(5, 100)
    first, waiting, last = admission.admit([5, 5, 5])
    admission.release(waiting)
    admission.release(waiting)
    assert admission.tokens_queued == 5
    admission.release(first)
    assert granted([waiting, last]) == [False, True]


def test_a_request_is_refused_whole_when_the_queue_has_no_room() -> None:
    admission = Admission(1, 10)
    admission.admit([1])
    admission.admit([2, 2], "a")
    with pytest.raises(
        Overloaded, match=r"4 tokens wait \(4 of this client\) and this request has 2; the queue holds 10"
    ):
        admission.admit([1, 1], "a")  # 6 of 10 are more than half
    assert admission.tokens_queued == 4
    admission.admit([1], "a")
    admission.admit([3], "b")
    with pytest.raises(Overloaded, match=r"8 tokens wait \(0 of this client\) and this request has 3"):
        admission.admit([3], "c")  # 2 are free
    admission.admit([2], "c")


@pytest.mark.parametrize("num_greedy", [1, 2, 5])
def test_greedy_clients_leave_room_for_another(num_greedy: int) -> None:
    admission = Admission(1, 1200)
    admission.admit([1])
    refused: set[int] = set()
    while len(refused) < num_greedy:
        for i in range(num_greedy):
            try:
                admission.admit([1], f"greedy {i}")
            except Overloaded:
                refused.add(i)
    # The threshold's fixed point: n clients with q each and q free, so q = 1200 / (n + 1), to the token each may add.
    share = 1200 // (num_greedy + 1)
    assert num_greedy * (share - 1) <= admission.tokens_queued <= num_greedy * (share + 1)
    admission.admit([share - num_greedy], "another")


def test_a_request_larger_than_the_queue_counts_as_half_of_it() -> None:
    admission = Admission(1, 10)
    admission.admit([1])
    admission.admit([100], "large")
    with pytest.raises(Overloaded):
        admission.admit([1], "large")
    admission.admit([5], "small")
    with pytest.raises(Overloaded):
        admission.admit([100], "late")  # the two have their halves


def test_one_item_does_not_wait_behind_another_client_s_thousand() -> None:
    admission = Admission(1, 2**20)
    many = admission.admit([500] * 1000, "many")
    [single] = admission.admit([500], "single")
    finished = 0
    while not single.granted.is_set():
        admission.release(many[finished])
        finished += 1
    # The first of many runs, and the second would start at 500 tokens; the other starts now, at 0.
    assert finished == 1
    assert granted(many[:2]) == [True, False]


def test_few_open_requests_are_served_as_much_as_many() -> None:
    """One client has 50 requests open, the other two, and each asks again when it is answered: half each."""
    admission = Admission(100, 2**20)
    tickets = [admission.admit([100], client)[0] for client in ("many",) * 50 + ("few",) * 2]
    served: dict[str, int] = defaultdict(int)
    for _ in range(400):
        [running] = [ticket for ticket in tickets if ticket.granted.is_set()]
        served[running.client] += 1
        tickets.remove(running)
        admission.release(running)
        tickets += admission.admit([100], running.client)
    assert abs(served["many"] - served["few"]) <= 2


def test_who_comes_back_at_once_is_not_served_twice_in_a_row() -> None:
    """A client with one request open, which ends as others wait, starts again where its last one ended."""
    admission = Admission(1, 2**20)
    [first] = admission.admit([100], "one")
    [other] = admission.admit([10], "other")
    [again] = admission.admit([100], "one")  # starts at 100; the other at 0, and its next at 10
    [others_next] = admission.admit([10], "other")
    admission.release(first)
    assert granted([other, again]) == [True, False]
    admission.release(other)
    assert granted([others_next, again]) == [True, False]


def test_an_idle_server_owes_nobody() -> None:
    """What was taken while nobody else waited is no debt."""
    admission = Admission(10, 2**20)
    for _ in range(100):
        admission.release(*admission.admit([10], "one"))
    [blocker] = admission.admit([10], "blocker")
    [early], [late] = admission.admit([10], "one"), admission.admit([10], "other")
    admission.release(blocker)
    assert granted([early, late]) == [True, False]


def test_a_deadline_in_the_queue_frees_the_place() -> None:
    admission = Admission(1, 10)
    admission.admit([1])
    [waiting] = admission.admit([5], "a")
    with pytest.raises(Overloaded):
        admission.admit([1], "a")
    admission.release(waiting)  # as the core does when the deadline passes
    admission.admit([1], "a")


sizes = st.integers(1, 6000)


@given(st.lists(st.lists(sizes, min_size=20, max_size=60), min_size=2, max_size=4))
@settings(max_examples=20, deadline=None)
def test_backlogged_clients_get_equal_shares(requests: list[list[int]]) -> None:
    # Goyal, Vin and Cheng, theorem 1: over any interval in which two flows are backlogged, what they were given
    # differs by at most the sum of their largest items.
    bound = 2 * max(max(request) for request in requests)
    admission = Admission(1, 10**9)  # one item at a time
    [blocker] = admission.admit([1])
    tickets = [ticket for i, request in enumerate(requests) for ticket in admission.admit(request, str(i))]
    running, given_to, left = blocker, defaultdict(int), {str(i): len(request) for i, request in enumerate(requests)}
    history = []
    while all(left.values()):
        history.append(dict(given_to))
        admission.release(running)
        [running] = [ticket for ticket in tickets if ticket.granted.is_set() and not ticket.released]
        given_to[running.client] += running.num_tokens
        left[running.client] -= 1
    for start in history:
        shares = [given_to[client] - start.get(client, 0) for client in left]
        assert max(shares) - min(shares) <= bound


class Machine(RuleBasedStateMachine):
    """Any order of requests, ends and cancellations keeps the budget, the order and the books."""

    @initialize(budget=st.integers(1, 20), queue=st.integers(1, 60))
    def start(self, budget: int, queue: int) -> None:
        self.budget = budget
        self.queue = queue
        self.admission = Admission(budget, queue)
        self.tickets: list[Ticket] = []
        self.was_granted: set[Ticket] = set()

    @rule(client=st.sampled_from("abc"), sizes=st.lists(st.integers(1, 25), min_size=1, max_size=5))
    def admit(self, client: str, sizes: list[int]) -> None:
        before = self.waiting_tokens()
        queued = self.admission.tokens_queued
        try:
            tickets = self.admission.admit(sizes, client)
        except Overloaded:
            assert queued, "an empty queue takes any request"
            assert self.waiting_tokens() == before
        else:
            assert [ticket.num_tokens for ticket in tickets] == sizes
            self.tickets += tickets

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        self.admission.release(ticket)
        self.admission.release(ticket)
        self.tickets.remove(ticket)

    @invariant()
    def books_are_right(self) -> None:
        flying = [ticket.num_tokens for ticket in self.tickets if ticket.granted.is_set()]
        assert self.admission.tokens_in_flight == sum(flying)
        assert self.admission.tokens_queued == sum(self.waiting_tokens().values())
        assert sum(flying) <= self.budget or len(flying) == 1
        assert flying or not self.tickets, "nothing runs while something waits"
        assert sum(min(tokens, self.queue / 2) for tokens in self.waiting_tokens().values()) <= self.queue

    @invariant()
    def a_grant_is_for_ever_and_in_the_client_s_order(self) -> None:
        now = {ticket for ticket in self.tickets if ticket.granted.is_set()}
        assert self.was_granted & set(self.tickets) <= now
        self.was_granted = now
        for client in "abc":
            flags = [ticket.granted.is_set() for ticket in self.tickets if ticket.client == client]
            assert flags == sorted(flags, reverse=True)

    def waiting_tokens(self) -> dict[str, int]:
        tokens = dict.fromkeys("abc", 0)
        for ticket in self.tickets:
            if not ticket.granted.is_set():
                tokens[ticket.client] += ticket.num_tokens
        return tokens

    def teardown(self) -> None:
        if not hasattr(self, "admission"):
            return
        # Ends what runs until nothing is left: whoever waits has its turn.
        while self.tickets:
            running = [ticket for ticket in self.tickets if ticket.granted.is_set()]
            assert running
            self.admission.release(running[0])
            self.tickets.remove(running[0])
        assert self.admission.tokens_in_flight == self.admission.tokens_queued == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_retry_after_is_the_excess_over_the_measured_rate() -> None:
    clock = Clock()
    admission = Admission(10, 100, clock=clock)
    tickets = admission.admit([10] * 6)
    with pytest.raises(Overloaded) as caught:
        admission.admit([60])
    assert caught.value.retry_after_s == 1.0  # nothing is measured yet
    clock.now += 0.5
    admission.release(tickets[0])
    # 40 wait, and 60 more are 50 too many for half the queue. 10 tokens in half a second are 20 a second: 2.5 s. The
    # average over 10 s weighs that half second as 10 (1 - exp(-0.05)) = 0.4877 s.
    with pytest.raises(Overloaded) as caught:
        admission.admit([60])
    assert caught.value.retry_after_s == pytest.approx(50 * 0.487706 / 10, rel=1e-5)


@pytest.mark.parametrize(("seconds", "total", "advice"), [(0.001, 11, 0.1), (1.0, 10_000, 60.0)])
def test_retry_after_stays_within_its_range(seconds: float, total: int, advice: float) -> None:
    clock = Clock()
    admission = Admission(10, 100, clock=clock)
    tickets = admission.admit([10] * 6)
    clock.now += seconds
    admission.release(tickets[0])
    with pytest.raises(Overloaded) as caught:
        admission.admit([total])  # 1 too many at 10,000 a second, and 9,990 too many at 10 a second
    assert caught.value.retry_after_s == advice


def test_the_rate_is_that_of_a_full_queue() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    assert rate.tokens_per_s() is None
    for _ in range(1000):
        clock.now += 0.1
        rate.add(7)
    # 70 tokens a second for 100 s; each weighs what it does at the moment it is added, so the sum is up to 0.5 % high.
    assert rate.tokens_per_s() == pytest.approx(70, rel=6e-3)
    clock.now += 3600
    rate.restart()
    assert rate.tokens_per_s() is None
    clock.now += 1
    rate.add(50)
    assert rate.tokens_per_s() == pytest.approx(50, rel=0.06)
