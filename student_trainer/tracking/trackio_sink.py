"""trackio: a local database, or the Space or server that its environment variables name."""

# The package is optional, and its names are unknown where it is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import trackio  # pyright: ignore[reportMissingImports]


class TrackioSink:
    """One run of `project`, found again by its name."""

    def __init__(self, *, project: str, name: str) -> None:
        self._project, self._name = project, name
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """See `Sink.start`."""
        # Standard output is the command's own result.
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                self._project,
                name=self._name,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Sink.log`."""
        assert self._run is not None, "started"
        self._run.log(dict(metrics), step=step)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """An alert, on the dashboard and wherever its web hook leads."""
        assert self._run is not None, "started"
        with redirect_stdout(sys.stderr):
            self._run.alert(title=f"{alarm['signal']} at step {alarm['step']}", text=alarm["sentence"])

    def finish(self) -> None:
        """See `Sink.finish`."""
        if self._run:
            with redirect_stdout(sys.stderr):
                self._run.finish()
