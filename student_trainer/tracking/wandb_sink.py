"""Weights & Biases, online or offline as WANDB_MODE says."""

# The package is optional, and its names are unknown where it is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb  # pyright: ignore[reportMissingImports]


class WandbSink:
    """One run of `project`, found again by `run_id`; its local files are in `folder`."""

    def __init__(self, folder: Path, *, project: str, run_id: str) -> None:
        self._folder, self._project, self._run_id = folder, project, run_id
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """See `Sink.start`."""
        self._run = wandb.init(
            project=self._project,
            id=self._run_id,
            name=self._folder.name,
            dir=str(self._folder),
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A step of our own as the axis: W&B's would drop the steps that are done again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Sink.log`."""
        assert self._run is not None, "started"
        self._run.log({"step": step, **metrics})

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """An alert, which W&B sends on as its user has set it up."""
        assert self._run is not None, "started"
        self._run.alert(title=f"{alarm['signal']} at step {alarm['step']}", text=alarm["sentence"], level="WARN")

    def finish(self) -> None:
        """See `Sink.finish`."""
        if self._run:
            self._run.finish()
