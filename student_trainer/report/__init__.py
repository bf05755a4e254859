"""From a run folder to a report that is read in a browser without a network: `write_report`."""

from student_trainer.report.write import write_report

__all__ = ["write_report"]
