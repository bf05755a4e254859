"""The token budget and its queue."""

from __future__ import annotations

import pytest

from protos.errors import Overloaded
from teacher_server.admission import Admission, Ticket


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


def test_a_request_is_refused_whole_when_the_queue_is_full() -> None:
    admission = Admission(5, 9)
    admission.admit([5])
    admission.admit([5])
    with pytest.raises(Overloaded, match="5 tokens wait and this request has 6; the queue holds 9"):
        admission.admit([1, 5])
    assert admission.tokens_queued == 5
    admission.admit([4])  # 5 + 4 = 9 still fit


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
