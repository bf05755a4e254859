"""Ends a worker process whose server is gone: a server killed by SIGKILL cannot end its own children, and an engine
left behind would hold the memory that the restarted server needs.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

SERVER_PID = "TEACHER_SERVER_PID"
"""The environment variable in which workers find their server; absent on other machines."""

POLL_S = 1.0


def adopt_workers() -> None:
    """Makes this process the server of every worker started from now on."""
    os.environ[SERVER_PID] = str(os.getpid())


def end_with_server() -> None:
    """Ends this process, whatever it is at, within about POLL_S of its server's end."""
    pid = os.environ.get(SERVER_PID)
    if pid is not None:
        threading.Thread(target=_watch, args=(int(pid),), name="end-with-server", daemon=True).start()


def _watch(pid: int) -> None:
    try:
        server = psutil.Process(pid)  # remembers the start time, so a reused pid is not taken for the server
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL_S)
    except psutil.NoSuchProcess:
        pass
    os._exit(1)
