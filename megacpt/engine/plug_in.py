"""megacpt's Adam in the place where Megatron Core looks for Apex's or Transformer Engine's."""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer as megatron_optim
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megacpt.optim.adam import FusedAdamW


def megatron_optimizer(settings: OptimizerConfig, chunks: list[Any], overrides: Any) -> Any:
    """Build Megatron's optimizer around `FusedAdamW`, with its moments created.

    Args:
        settings: Megatron's configuration.
        chunks: the model chunks, wrapped in Megatron's `DistributedDataParallel`.
        overrides: settings of parameter groups (no decay on norms and biases).
    """
    megatron_optim.Adam = FusedAdamW
    megatron_optim.USING_PYTORCH_OPTIMIZER = False
    optimizer = megatron_optim.get_megatron_optimizer(
        settings, chunks, config_overrides=overrides, use_gloo_process_groups=False
    )
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.optimizer.create_state()
    return optimizer
