"""A run folder from a model of Hugging Face: its weights as a checkpoint that stages continue."""

from __future__ import annotations

from pathlib import Path

from megacpt.convert.adopt import adopt
from megacpt.convert.derived import Progress
from megacpt.convert.foreign import open_foreign

OPERATION = "from-hf"


def from_hf(
    source: Path,
    out: Path,
    tokenizer: str | None = None,
    dtype: str = "float32",
    workers: int = 1,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model as a run folder that holds one checkpoint of weights alone; every rank calls this.

    Names, shapes and dtypes of all tensors are compared with what config.json describes before a weight is read.

    Args:
        source: a folder with config.json, weights and tokenizer.
        out: see `adopt`, as `tokenizer`, `dtype`, `workers` and `progress`.
        tokenizer: see there; needed for a model that comes without one.
        dtype: see there.
        workers: see there.
        allow_pickle: see `open_weights`.
        progress: see there.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: the model has what no network here has, with every key; or as `adopt`.
        CheckpointError: a tensor is missing or does not fit; or as `adopt`.
    """
    return adopt(open_foreign(source, allow_pickle), out, tokenizer, OPERATION, dtype, workers, progress)
