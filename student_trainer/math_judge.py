"""math-verify in a process of its own, which can be killed.

Some expressions that models write (99999999999!) keep sympy busy for ever inside C code that no signal interrupts, and
math-verify's own time limits work in the main thread alone. A judge that is late is killed, and the next question
starts another.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import select
import subprocess
import sys
import threading
from dataclasses import dataclass

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For importing sympy, on a busy machine."""

ANSWER_TIMEOUT_S = 5.0
"""For one comparison; nearly all take milliseconds."""

MEMORY_BYTES = 4 * 2**30
"""A judge's address space; a tower of powers fails here, not in the trainer."""


@dataclass(frozen=True)
class Verdict:
    """Whether math-verify found an expression in the text, and whether it equals the answer."""

    is_readable: bool
    is_right: bool


_NO_TIMEOUT = 0
"""math-verify's word for it; the parent process keeps the time."""

UNDECIDED = Verdict(is_readable=False, is_right=False)


class MathJudge:
    """One judge process, started when first asked; safe to use from several threads."""

    def __init__(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def judge(self, answer: str | None, text: str) -> Verdict:
        """The verdict on `text`; UNDECIDED when it takes too long or too much memory.

        Args:
            answer: the right answer in LaTeX, or None to ask only whether `text` can be read.
            text: what to judge.
        """
        with self._lock:
            process = self._process or self._start()
            try:
                print(json.dumps([answer, text]), file=process.stdin, flush=True)
                return Verdict(*json.loads(_read_line(process, self._timeout_s)))
            except (TimeoutError, BrokenPipeError, EOFError) as failure:
                logger.warning("math-verify gave up on %.80r: %r", text, failure)
                self._stop()
                return UNDECIDED

    def close(self) -> None:
        """Ends the process; a later question starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _read_line(process, START_TIMEOUT_S)
        return process

    def _stop(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


def judge(answer: str | None, text: str) -> Verdict:
    """`MathJudge.judge` of the one judge that this process shares."""
    return _shared_judge().judge(answer, text)


@functools.cache
def _shared_judge() -> MathJudge:
    shared = MathJudge()
    atexit.register(shared.close)
    return shared


def _read_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    if not ready:
        raise TimeoutError(f"no verdict in {timeout_s:g} s")
    line = process.stdout.readline()
    if not line:
        raise EOFError(f"the judge ended with status {process.wait()}")
    return line


def _serve() -> None:
    """The judge's side: a line of JSON in, a line of JSON out."""
    import resource

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr
    # The first comparison imports half of sympy; that belongs to the start, not to the first question's time.
    verify(
        parse("$x+1$", parsing_timeout=_NO_TIMEOUT),
        parse("$1+x$", parsing_timeout=_NO_TIMEOUT),
        timeout_seconds=_NO_TIMEOUT,
    )
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, text = json.loads(line)
        try:
            found = parse(text, parsing_timeout=_NO_TIMEOUT)
            right = answer is not None and verify(
                parse(answer, parsing_timeout=_NO_TIMEOUT), found, timeout_seconds=_NO_TIMEOUT
            )
            verdict = [bool(found), right]
        except (Exception, RecursionError, MemoryError):
            verdict = [False, False]
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
