"""Rules that can never sound, found by what a run has logged: said once, as soon as it can be known."""

from __future__ import annotations

from student_trainer.alarms import unknown_signals
from student_trainer.config import OpdStage, OpsdStage, TrainConfig
from student_trainer.config.watch import DEFAULT_RULES
from student_trainer.run_folder import Row
from student_trainer.stages.opd import BY_TEACHER


class Doubts:
    """The user's own rules, each held against the first step that must log its signal.

    Where student and teacher both write steps, a rule on what the teacher wrote waits for a step of the teacher's, and
    every other for one of the student's.
    """

    def __init__(self, config: TrainConfig) -> None:
        stage = config.stage
        share = stage.teacher_written if isinstance(stage, OpdStage | OpsdStage) else 0.0
        rules = [rule for rule in config.watch.rules if rule not in DEFAULT_RULES]
        writers = [by_teacher for by_teacher, is_met in ((False, share < 1), (True, share > 0)) if is_met]
        self._rules = {
            by_teacher: [one for one in rules if len(writers) == 1 or one.signal.startswith(BY_TEACHER) is by_teacher]
            for by_teacher in writers
        }

    def of(self, row: Row) -> list[str]:
        """Sentences about the rules that a step's row is the first to judge."""
        return unknown_signals(self._rules.pop(bool(row.get("teacher_written")), ()), row)
