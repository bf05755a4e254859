"""One teacher made of several replicas: `TeacherPool`, its options and its counters."""

from protos.pool.options import PoolOptions
from protos.pool.stats import PoolStats, ReplicaStats
from protos.pool.teacher_pool import TeacherPool

__all__ = ["PoolOptions", "PoolStats", "ReplicaStats", "TeacherPool"]
