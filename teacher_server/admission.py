"""How much work may be in flight, and whose comes next: a budget of tokens and a bounded queue, fair between clients.

The order is start-time fair queueing (Goyal, Vin and Cheng, "Start-time fair queueing", SIGCOMM 1996, section 2): an
item starts, on a clock that counts tokens, where the one before it of its client ended, or now if that is later; the
earliest start is next. So two clients who both wait are given the same tokens to within their two largest items,
whatever the sizes, and one that always has a few requests open is not passed by one that has many: turns of a fixed
quantum, as in deficit round robin, give the latter a whole quantum for each of the former's requests. The bound is a
dynamic threshold (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM
ToN 1998): a client may have as much waiting as the queue has free, so there is always room for another. One alone has
half the queue; n have an (n + 1)-th each.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protos.errors import Overloaded
from teacher_server.drain_rate import DrainRate

UNMEASURED_RETRY_AFTER_S = 1.0
"""What Overloaded advises before any rate is measured: about the time of one batch of scoring."""

RETRY_AFTER_RANGE_S = (0.1, 60.0)
"""No advice is shorter than a round trip with its set-up, or longer than the rate it rests on can be trusted."""


@dataclass(eq=False)
class Ticket:
    """The right of one item to enter the engine once `granted`; give it back with `Admission.release`."""

    num_tokens: int
    client: str
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    released: bool = False


@dataclass
class _Waiting:
    """One client's waiting tickets in order, their tokens, and when on the clock of tokens the first one starts."""

    start: int
    tickets: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    num_tokens: int = 0


class Admission:
    """Grants tickets while the tokens in flight stay within the budget, fairly and each client's in order.

    An item larger than the budget enters alone; a request larger than half the queue counts as half when its client has
    nothing else waiting: neither could ever be served otherwise.
    """

    def __init__(
        self, max_tokens_in_flight: int, max_queued_tokens: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tokens_queued = 0
        self.tokens_in_flight = 0
        self._max_in_flight = max_tokens_in_flight
        self._max_queued = max_queued_tokens
        self._waiting: dict[str, _Waiting] = {}
        self._now = 0  # on the clock of tokens: the start of the last item granted
        self._ends: dict[str, int] = {}  # of the last items of clients that no longer wait, where later than now
        self._drain_rate = DrainRate(clock)

    def admit(self, sizes: Sequence[int], client: str = "") -> list[Ticket]:
        """One ticket for each item of a request of `client`, all or none; `sizes` in tokens.

        Raises:
            Overloaded: the queue has no room for the request, or the client has too much in it already.
        """
        assert sizes
        total = sum(sizes)
        self._check_room(total, client)
        if not self._waiting:
            self._drain_rate.restart()
        tickets = [Ticket(size, client) for size in sizes]
        if client not in self._waiting:
            self._waiting[client] = _Waiting(max(self._now, self._ends.pop(client, 0)))
        waiting = self._waiting[client]
        waiting.tickets.update(dict.fromkeys(tickets))
        waiting.num_tokens += total
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
            self._drain_rate.add(ticket.num_tokens)
        else:
            self._leave_queue(ticket)
        self._grant()
        if not self.tokens_in_flight:
            self._ends.clear()  # an idle server owes nobody

    def _check_room(self, total: int, client: str) -> None:
        half = self._max_queued / 2
        taken = sum(min(waiting.num_tokens, half) for waiting in self._waiting.values())
        room = min(self._max_queued - taken, half)
        own = self._waiting[client].num_tokens if client in self._waiting else 0
        wanted = own + total if own else min(total, half)
        if wanted <= room:
            return
        raise Overloaded(
            f"{self.tokens_queued} tokens wait ({own} of this client) and this request has {total}; the queue holds "
            f"{self._max_queued}, of one client at most half and no more than is free",
            retry_after_s=self._retry_after_s(wanted - room),
        )

    def _retry_after_s(self, excess_tokens: float) -> float:
        """Seconds until that many tokens have left the queue at the rate of late."""
        rate = self._drain_rate.tokens_per_s()
        if rate is None:
            return UNMEASURED_RETRY_AFTER_S
        least, most = RETRY_AFTER_RANGE_S
        return min(max(excess_tokens / rate, least), most)

    def _grant(self) -> None:
        while self._waiting:
            ticket = self._next()
            # What does not fit holds up all that comes after it: smaller items passing by would starve it.
            if self.tokens_in_flight and self.tokens_in_flight + ticket.num_tokens > self._max_in_flight:
                return
            waiting = self._waiting[ticket.client]
            self._now = waiting.start
            waiting.start += ticket.num_tokens
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}
            self._leave_queue(ticket)
            self.tokens_in_flight += ticket.num_tokens
            ticket.granted.set()

    def _next(self) -> Ticket:
        """The ticket that starts first; of several, that of the client that has waited longest."""
        waiting = min(self._waiting.values(), key=lambda waiting: waiting.start)
        return next(iter(waiting.tickets))

    def _leave_queue(self, ticket: Ticket) -> None:
        waiting = self._waiting[ticket.client]
        del waiting.tickets[ticket]
        waiting.num_tokens -= ticket.num_tokens
        self.tokens_queued -= ticket.num_tokens
        if not waiting.tickets:
            self._ends[ticket.client] = waiting.start
            del self._waiting[ticket.client]
