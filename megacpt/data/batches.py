"""From samples to what an optimizer step and an evaluation take."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megacpt.data.stage_data import StageData
from megacpt.data.stream import TokenStream
from megacpt.errors import ConfigError, DataError


def microbatches(
    data: StageData, step: int, batch_sequences: int, microbatch: int, dp_rank: int, dp_size: int
) -> list[np.ndarray]:
    """Return the microbatches [microbatch, L + 1] of data-parallel rank `dp_rank` in `step` (from 0).

    Sequence k of microbatch m is sample ``(m * dp_size + dp_rank) * microbatch + k`` of the step's
    `batch_sequences` samples, so that the global batch is the same for any number of ranks and any microbatch
    size.

    Raises ConfigError unless `batch_sequences` is a multiple of ``microbatch * dp_size``.
    """
    together = microbatch * dp_size
    if microbatch < 1 or dp_size < 1 or batch_sequences < 1 or batch_sequences % together:
        raise ConfigError(
            f"batch.sequences ({batch_sequences}) must be a multiple of batch.microbatch ({microbatch}) "
            f"times the number of data-parallel ranks ({dp_size})"
        )
    first = step * batch_sequences
    mine = first + np.arange(batch_sequences).reshape(-1, dp_size, microbatch)[:, dp_rank]
    return list(data.gather(mine.reshape(-1)).reshape(*mine.shape, -1))


def eval_windows(
    stream: TokenStream, seq_length: int, max_tokens: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids [seq_length + 1] as int64, valid [seq_length] as bool) from the beginning of `stream`.

    Target i is ``ids[i + 1]``; it counts where ``valid[i]``. Each token but the first of the stream is a
    target exactly once, up to `max_tokens` targets; the last window is padded with id 0.

    Raises DataError when the stream has fewer than two tokens.
    """
    if stream.tokens < 2:
        raise DataError(f"the stream {stream.folder} has {stream.tokens} tokens: at least 2 are needed to predict one")
    targets = stream.tokens - 1 if max_tokens is None else min(stream.tokens - 1, max_tokens)
    for begin in range(0, targets, seq_length):
        count = min(seq_length, targets - begin)
        ids = np.zeros(seq_length + 1, dtype=np.int64)
        ids[: count + 1] = stream.read(begin, count + 1)
        yield ids, np.arange(seq_length) < count
