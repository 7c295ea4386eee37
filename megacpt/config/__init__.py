"""What a run is: typed, validated YAML. Imports no torch and no numpy."""

from __future__ import annotations

from megacpt.config.checks import check, check_layout, check_streams
from megacpt.config.latent import LatentConfig
from megacpt.config.loading import dump, load_model, load_run, overlay, run_from_mapping
from megacpt.config.mixture import (
    PhaseConfig,
    ReplayConfig,
    RetentionConfig,
    StreamConfig,
    WeightedStream,
    timeline,
    weights_over_time,
)
from megacpt.config.model import ModelConfig
from megacpt.config.moe import (
    Balance,
    BiasBalance,
    MoEConfig,
    NoBalance,
    PenaltyBalance,
    SinkhornBalance,
)
from megacpt.config.parts import (
    BatchConfig,
    CheckpointConfig,
    EvaluateConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
)
from megacpt.config.quantise import QuantiseConfig, ScaleConfig
from megacpt.config.quantities import Duration, Part, Rate, Share, Tokens
from megacpt.config.rope import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling, YarnScaling
from megacpt.config.run import RunConfig
from megacpt.config.schedule import (
    AnnealSchedule,
    ConstantSchedule,
    CosineSchedule,
    InfiniteSchedule,
    LinearSchedule,
    RewarmedCosineSchedule,
    RexSchedule,
    ScheduleConfig,
    TrilmSchedule,
    WsdSchedule,
    WsdSSchedule,
)
from megacpt.config.stage import StageConfig

__all__ = [
    "AnnealSchedule",
    "Balance",
    "BatchConfig",
    "BiasBalance",
    "CheckpointConfig",
    "ConstantSchedule",
    "CosineSchedule",
    "Duration",
    "EvaluateConfig",
    "InfiniteSchedule",
    "LatentConfig",
    "LinearScaling",
    "LinearSchedule",
    "Llama3Scaling",
    "LogConfig",
    "MoEConfig",
    "ModelConfig",
    "NoBalance",
    "OptimConfig",
    "ParallelConfig",
    "Part",
    "PenaltyBalance",
    "PhaseConfig",
    "QuantiseConfig",
    "Rate",
    "ReplayConfig",
    "RetentionConfig",
    "RewarmedCosineSchedule",
    "RexSchedule",
    "RopeConfig",
    "RopeScaling",
    "RunConfig",
    "ScaleConfig",
    "ScheduleConfig",
    "Share",
    "SinkhornBalance",
    "StageConfig",
    "StreamConfig",
    "Tokens",
    "TrilmSchedule",
    "WeightedStream",
    "WsdSSchedule",
    "WsdSchedule",
    "YarnScaling",
    "check",
    "check_layout",
    "check_streams",
    "dump",
    "load_model",
    "load_run",
    "overlay",
    "run_from_mapping",
    "timeline",
    "weights_over_time",
]
