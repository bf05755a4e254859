"""SIGTERM and SIGINT as a request: the run ends at the next place where nothing is lost.

The flag is the module's, as the signals are the process's.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from student_trainer.distributed import gather
from student_trainer.stopped import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)

_received: list[int] = []


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Within it the first signal only sets the flag; the second one does what it always did.

    Outside the main thread, where Python takes no signals, nothing is deferred.
    """
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def receive(signum: int, _: FrameType | None) -> None:
        _received.append(signum)
        restore()
        logger.warning("%s: stopping after this step; again to stop at once", signal.Signals(signum).name)

    for signum in SIGNALS:
        signal.signal(signum, receive)
    try:
        yield
    finally:
        restore()


def tell_ranks() -> None:
    """A signal that has come to one process of the run counts for all, from here on."""
    _received.extend(signum for signums in gather(list(_received)) for signum in signums if signum not in _received)


def is_requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


def raise_if_requested() -> None:
    """Raises Interrupted when a signal has come."""
    if _received:
        raise Interrupted(_received[0])
