"""What a sink must do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Sink(Protocol):
    """A place that shows a run's metrics. Any method may raise: the run then goes on without the sink."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens this run's page, or goes on with it; `config` is the resolved config as plain tables."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics. Steps rise, but a run that is resumed or rolled back does some of them again."""
        ...

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """One row of alarms.jsonl: its `step`, its `signal`, and the `sentence` that a person reads."""
        ...

    def finish(self) -> None:
        """Sends what is left and closes."""
        ...
