"""How much work may be in flight: a budget of tokens in the engine and a bounded, first-come queue before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.errors import Overloaded

RETRY_AFTER_S = 1.0
"""What Overloaded advises: about the time in which an engine finishes one batch of scoring."""


@dataclass(eq=False)
class Ticket:
    """The right of one item to enter the engine once `granted`; give it back with `Admission.release`."""

    num_tokens: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    released: bool = False


class Admission:
    """Grants tickets in order while the tokens in flight stay within the budget.

    An item larger than the budget enters alone; a request larger than the queue enters an empty queue: neither could
    ever be served otherwise.
    """

    def __init__(self, max_tokens_in_flight: int, max_queued_tokens: int) -> None:
        self._max_in_flight = max_tokens_in_flight
        self._max_queued = max_queued_tokens
        self._queue: deque[Ticket] = deque()
        self.tokens_queued = 0
        self.tokens_in_flight = 0

    def admit(self, sizes: Sequence[int]) -> list[Ticket]:
        """One ticket for each item of a request, all or none; `sizes` in tokens.

        Raises:
            Overloaded: the queue has no room for the request.
        """
        total = sum(sizes)
        if self._queue and self.tokens_queued + total > self._max_queued:
            raise Overloaded(
                f"{self.tokens_queued} tokens wait and this request has {total}; the queue holds {self._max_queued}",
                retry_after_s=RETRY_AFTER_S,
            )
        tickets = [Ticket(size) for size in sizes]
        self._queue.extend(tickets)
        self.tokens_queued += total
        self._grant()
        return tickets

    def release(self, ticket: Ticket) -> None:
        """Takes the ticket out of the queue or out of flight; a second time does nothing."""
        if ticket.released:
            return
        ticket.released = True
        if ticket.granted.is_set():
            self.tokens_in_flight -= ticket.num_tokens
        else:
            self._queue.remove(ticket)
            self.tokens_queued -= ticket.num_tokens
        self._grant()

    def _grant(self) -> None:
        while self._queue:
            ticket = self._queue[0]
            if self.tokens_in_flight and self.tokens_in_flight + ticket.num_tokens > self._max_in_flight:
                return
            self._queue.popleft()
            self.tokens_queued -= ticket.num_tokens
            self.tokens_in_flight += ticket.num_tokens
            ticket.granted.set()
