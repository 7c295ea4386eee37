"""megacpt's optimizers in the place where Megatron Core looks for Apex's or Transformer Engine's Adam."""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer as megatron_optim
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megacpt.optim.adam import FusedAdamW
from megacpt.optim.lion import Lion
from megacpt.optim.moments import MomentOptimizer

OPTIMIZERS: dict[str, type[MomentOptimizer]] = {"adamw": FusedAdamW, "lion": Lion}


def megatron_optimizer(kind: str, settings: OptimizerConfig, chunks: list[Any], overrides: Any) -> Any:
    """Build Megatron's optimizer around one of megacpt's, with its state created.

    Args:
        kind: a name in `OPTIMIZERS`.
        settings: Megatron's configuration.
        chunks: the model chunks, wrapped in Megatron's `DistributedDataParallel`.
        overrides: settings of parameter groups (no decay on norms and biases).
    """
    made = OPTIMIZERS[kind]
    megatron_optim.Adam = distrib_optimizer.Adam = made
    megatron_optim.USING_PYTORCH_OPTIMIZER = False
    optimizer = megatron_optim.get_megatron_optimizer(
        settings, chunks, config_overrides=overrides, use_gloo_process_groups=False
    )
    optimizer.MOMENTS = made.MOMENTS
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.optimizer.create_state()
    return optimizer
