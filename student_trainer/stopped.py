"""How a run ends before its last step, and with which exit code; it can go on from its last checkpoint each time.

Stopped
├── StoppedByRule    a rule of `watch` said so
├── TeacherGone      the teacher did not come back within `teacher.max_wait_s`
├── Interrupted      SIGTERM or SIGINT
└── PeerLost         another process of the run, started by torchrun, ended or could not go on
"""

from __future__ import annotations

import os
import signal


class Stopped(Exception):
    """The run has ended early; the message is one sentence for a person."""

    exit_code = 1


class StoppedByRule(Stopped):
    """Started again, the run stops again, until the rule is changed."""

    exit_code = 3


class TeacherGone(Stopped):
    """Started again, the run goes on."""

    exit_code = os.EX_TEMPFAIL


class PeerLost(Stopped):
    """Started again, the run goes on."""

    exit_code = os.EX_TEMPFAIL


class Interrupted(Stopped):
    """Started again, the run goes on; the exit code is the shell's for the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command to go on")
        self.exit_code = 128 + signum
