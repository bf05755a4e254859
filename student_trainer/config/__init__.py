"""What a run is: the TOML config, its defaults and its checks. Pydantic only; nothing heavy is imported here."""

from student_trainer.config.base import ConfigError, Section
from student_trainer.config.loss import LossConfig
from student_trainer.config.model import LoraConfig, ModelConfig, OptimConfig
from student_trainer.config.parse import dump_config, load_config, parse_config
from student_trainer.config.run import CheckpointConfig, EvalConfig, RolloutConfig, TrainConfig
from student_trainer.config.stage import OpdStage, OpsdStage, SftStage, StageConfig
from student_trainer.config.teacher import (
    AnswerPrivileged,
    PrivilegedConfig,
    ReferencePrivileged,
    SystemPrivileged,
    TeacherConfig,
)

__all__ = [
    "AnswerPrivileged",
    "CheckpointConfig",
    "ConfigError",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OpdStage",
    "OpsdStage",
    "OptimConfig",
    "PrivilegedConfig",
    "ReferencePrivileged",
    "RolloutConfig",
    "Section",
    "SftStage",
    "StageConfig",
    "SystemPrivileged",
    "TeacherConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
