"""A run's metrics, shown elsewhere as they come: `follow`. The run folder stays the truth."""

from student_trainer.tracking.follow import follow

__all__ = ["follow"]
