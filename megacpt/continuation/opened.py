"""Opening a checkpoint to look at or to use: its model, tokenizer and configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megacpt.checkpoint.store import find_checkpoint, load_checkpoint
from megacpt.config import RunConfig, check_layout, load_run
from megacpt.continuation.boundary import RUN
from megacpt.data.tokenizer import Tokenizer, load_tokenizer
from megacpt.engine.megatron import MegatronEngine
from megacpt.runtime.layout import start_process_group, world_size


def open_model(
    path: Path, train: bool = False, overrides: Sequence[str] = ()
) -> tuple[MegatronEngine, Tokenizer, RunConfig]:
    """Load a checkpoint for evaluation or generation, in the layout that fits the ranks at hand.

    The layout it was trained in does not matter: without overrides, all ranks are data-parallel.

    Args:
        path: a checkpoint, or a run folder for its newest.
        train: build the optimizer too, and load its state.
        overrides: ``KEY=VALUE`` on top of the checkpoint's configuration, such as ``parallel.tensor=2``.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged.
        LayoutError: if the overrides do not fit the model or the ranks.
    """
    folder = find_checkpoint(path)
    alone = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "virtual_pipeline", "context")]
    alone += ["parallel.sequence=false", "parallel.distributed_optimizer=false", "parallel.gather=full"]
    config = load_run(folder / RUN, [*alone, *overrides])
    tokenizer = load_tokenizer(config.tokenizer)
    start_process_group()
    # Evaluation fills its last microbatches, so that only training needs a batch that the ranks divide.
    check_layout(config, world_size() if train else None, tokenizer.vocab_size)
    engine = MegatronEngine(config, tokenizer.vocab_size, train=train)
    load_checkpoint(folder, engine)
    return engine, tokenizer, config
