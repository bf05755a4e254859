"""TensorBoard: event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 10
"""Between two writes to disk: about as often as a person looks."""


class TensorBoardSink:
    """Writes below `folder`; steps that are done again replace what was shown of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._last = -1
        self._config = ""

    def start(self, config: Mapping[str, Any]) -> None:
        """Keeps the config for the first step: only then is it known from where on earlier events are void."""
        self._config = tomli_w.dumps(config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Sink.log`."""
        writer = self._writer_from(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """A text below the tag alarm/SIGNAL."""
        self._writer_from(alarm["step"]).add_text(f"alarm/{alarm['signal']}", alarm["sentence"], alarm["step"])

    def finish(self) -> None:
        """See `Sink.finish`."""
        if self._writer:
            self._writer.close()

    def _writer_from(self, step: int) -> SummaryWriter:
        """The open writer, or a new one, which voids all earlier events from `step` on."""
        if self._writer is None or step < self._last:
            self.finish()
            self._writer = SummaryWriter(str(self._folder), purge_step=step, flush_secs=FLUSH_S)
            self._writer.add_text("config", f"```toml\n{self._config}```", step)
        self._last = step
        return self._writer
