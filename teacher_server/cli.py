"""`teacher-server`: flags to a ServeConfig, errors to one sentence; imports nothing heavy before a server starts."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from teacher_server.config import ServeConfig, StartError

USAGE_ERROR = 2

app = App(
    name="teacher-server",
    help="Scores text it did not write, and continues it, over HTTP and gRPC.",
    version_flags=[],
)


@app.command
def serve(config: Annotated[ServeConfig, Parameter(name="*")]) -> int:
    """Serves one model until SIGTERM or Ctrl-C, which drain."""
    from teacher_server.serve import run

    return run(config)


def main() -> None:
    """The program: exits with 0 after a drain, 1 when the engine died, 2 when it cannot start."""
    try:
        command, bound, _ = app.parse_args(exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError) as error:
        _refuse(error)
    try:
        status = command(*bound.args, **bound.kwargs)
    except StartError as error:
        _refuse(error)
    sys.exit(status)


def _refuse(error: Exception) -> NoReturn:
    sys.stderr.write(f"teacher-server: {error}\n")
    sys.exit(USAGE_ERROR)
