"""From run folders to reports that are read in a browser without a network: `write_report`, `write_comparison`."""

from student_trainer.report.compare import write_comparison
from student_trainer.report.write import write_report

__all__ = ["write_comparison", "write_report"]
