"""`teacher-server`: flags to configs, errors to one sentence; imports nothing heavy before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from protos.errors import TeacherError
from teacher_server.commands import BenchConfig, CheckConfig, Json, ScoreConfig
from teacher_server.config import ServeConfig, StartError

USAGE_ERROR = 2
INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""

_Flags = Parameter(name="*")

app = App(
    name="teacher-server",
    help="Scores text it did not write, and continues it, over HTTP and gRPC.",
    version_flags=[],
)


@app.command
def serve(config: Annotated[ServeConfig, _Flags]) -> int:
    """Serves one model until SIGTERM or Ctrl-C, which drain."""
    from teacher_server.serve import run

    return run(config)


@app.command
def info(url: str, /, *, json: Json = False) -> int:
    """Prints what the teacher at a URL is.

    Args:
        url: As in grpc://127.0.0.1:8001 or http://127.0.0.1:8000.
        json: Print JSON instead of a table.
    """
    from teacher_server import ask

    return ask.info(url, as_json=json)


@app.command
def score(url: str, /, config: Annotated[ScoreConfig, _Flags] = ScoreConfig()) -> int:
    """Prints the log-prob of every token of a completion, and the teacher's alternatives.

    Args:
        url: As in grpc://127.0.0.1:8001 or http://127.0.0.1:8000.
    """
    from teacher_server import ask

    return ask.score(url, config)


@app.command
def bench(url: str, /, config: Annotated[BenchConfig, _Flags] = BenchConfig()) -> int:
    """Loads the teacher at a URL with random texts and prints tokens a second, latency and bytes.

    Args:
        url: As in grpc://127.0.0.1:8001 or http://127.0.0.1:8000.
    """
    from teacher_server import ask

    return ask.bench(url, config)


@app.command
def check(url: str, /, config: Annotated[CheckConfig, _Flags] = CheckConfig()) -> int:
    """Compares a teacher's answers with themselves, its replicas' and a reference model's; exits with 1 on a failure.

    Args:
        url: As in grpc://127.0.0.1:8001; more after commas are its replicas.
    """
    from teacher_server import ask

    return ask.check(url, config)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The program: exits with 0 when all went well, 1 when it did not, 2 when it cannot start or was asked wrongly.

    Args:
        args: the command line behind the program's name; this process's own when None.
    """
    try:
        command, bound, _ = app.parse_args(args, exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError) as error:
        _refuse(error)
    try:
        status = command(*bound.args, **bound.kwargs)
    except (StartError, TeacherError) as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(status)


def _refuse(error: Exception) -> NoReturn:
    sys.stderr.write(f"teacher-server: {error}\n")
    sys.exit(USAGE_ERROR)
