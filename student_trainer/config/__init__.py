"""What a run is: the TOML config, its defaults and its checks. Pydantic only; nothing heavy is imported here."""

from student_trainer.config.base import ConfigError, Section
from student_trainer.config.loss import LossConfig
from student_trainer.config.model import LoraConfig, ModelConfig, OptimConfig
from student_trainer.config.parse import dump_config, load_config, parse_config
from student_trainer.config.policy import GrpoStage, PolicyStage, PpoStage
from student_trainer.config.privileged import (
    AnswerPrivileged,
    IdsPrivileged,
    PrivilegedConfig,
    ReferencePrivileged,
    TextPrivileged,
)
from student_trainer.config.run import CheckpointConfig, EvalConfig, RolloutConfig, TrainConfig
from student_trainer.config.stage import OpdStage, OpsdStage, SftStage, StageConfig
from student_trainer.config.teacher import TeacherConfig
from student_trainer.config.tracking import TrackingConfig
from student_trainer.config.watch import Rule, WatchConfig

__all__ = [
    "AnswerPrivileged",
    "CheckpointConfig",
    "ConfigError",
    "EvalConfig",
    "GrpoStage",
    "IdsPrivileged",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OpdStage",
    "OpsdStage",
    "OptimConfig",
    "PolicyStage",
    "PpoStage",
    "PrivilegedConfig",
    "ReferencePrivileged",
    "RolloutConfig",
    "Rule",
    "Section",
    "SftStage",
    "StageConfig",
    "TeacherConfig",
    "TextPrivileged",
    "TrackingConfig",
    "TrainConfig",
    "WatchConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
