"""From what a run logs to the sinks that its config names; a sink's failure is a warning, never the run's end."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, assert_never

from student_trainer.config import ConfigError, TrackingConfig, TrainConfig
from student_trainer.config.tracking import SinkName
from student_trainer.distributed import is_main
from student_trainer.run_folder import Row, RunFolder
from student_trainer.tracking.base import Sink

ID_FILE = "tracking_id"
"""Of the run folder: the id by which a resumed run finds its page again."""

logger = logging.getLogger(__name__)


@contextmanager
def follow(run: RunFolder, config: TrainConfig) -> Iterator[None]:
    """Sends what `run` logs to the config's sinks too.

    Raises:
        ConfigError: a sink's package is not installed.
    """
    tables = config.model_dump(mode="json", exclude_none=True)
    with ExitStack() as stack:
        for sink in build_sinks(config.tracking, run.path) if is_main() else ():
            sink.start(tables)
            stack.callback(sink.finish)
            run.listeners.append(sink)
            stack.callback(run.listeners.remove, sink)
        yield


def build_sinks(config: TrackingConfig, folder: Path) -> list[Unfailing]:
    """The sinks by name, not yet started.

    Raises:
        ConfigError: a sink's package is not installed.
    """
    for name in config.sinks:
        if find_spec(name) is None:
            raise ConfigError(f"tracking.sinks names {name}, which is not installed: pip install 'opd[tracking]'")
    return [Unfailing(name, _build(name, config.project, folder)) for name in config.sinks]


class Unfailing:
    """A sink that warns once when it fails, and takes nothing more from then on."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._sink = sink
        self._has_failed = False

    def start(self, config: Mapping[str, Any]) -> None:
        """See `Sink.start`."""
        self._attempt(lambda: self._sink.start(config))

    def log(self, row: Row) -> None:
        """One row of metrics.jsonl; what is no number stays in the file."""
        metrics = {name: float(value) for name, value in row.items() if name != "step" and _is_number(value)}
        self._attempt(lambda: self._sink.log(row["step"], metrics))

    def alarm(self, row: Row) -> None:
        """One row of alarms.jsonl."""
        self._attempt(lambda: self._sink.alarm(row))

    def finish(self) -> None:
        """See `Sink.finish`."""
        self._attempt(self._sink.finish)

    def _attempt(self, act: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            act()
        except Exception as error:
            self._has_failed = True
            logger.warning(
                "%s failed and gets nothing more of this run, which goes on: %s: %s",
                self._name,
                type(error).__name__,
                error,
            )


def _build(name: SinkName, project: str, folder: Path) -> Sink:
    match name:
        case "tensorboard":
            from student_trainer.tracking.tensorboard_sink import TensorBoardSink

            return TensorBoardSink(folder / "tensorboard")
        case "wandb":
            from student_trainer.tracking.wandb_sink import WandbSink

            return WandbSink(folder, project=project, run_id=_run_id(folder))
        case "trackio":
            from student_trainer.tracking.trackio_sink import TrackioSink

            return TrackioSink(project=project, name=f"{folder.name}-{_run_id(folder)}")
        case _:
            assert_never(name)


def _run_id(folder: Path) -> str:
    """The run's id, made on first use."""
    file = folder / ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
