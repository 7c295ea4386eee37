"""A run as resolved, with the numbers that follow from it: `megacpt config show`."""

from __future__ import annotations

from megacpt.config.loading import dump
from megacpt.config.mixture import timeline
from megacpt.config.run import RunConfig


def derived(config: RunConfig, vocab: int | None = None, world_size: int | None = None) -> dict[str, int]:
    """Numbers that follow from a run, by name.

    Args:
        config: the run.
        vocab: entries of the tokenizer, for the size of the model where `model.vocab_size` is null.
        world_size: number of ranks; adds the data-parallel size and the microbatches of a rank. The layout must
            be one that `check_layout` accepts.
    """
    parallel, batch = config.parallel, config.batch
    numbers = {
        "tokens_per_step": config.tokens_per_step,
        "stage_steps": config.stage_steps,
        "stage_tokens": config.stage_steps * config.tokens_per_step,
        "replay_tokens": _replay_tokens(config),
    }
    if config.model.vocab_size is not None or vocab is not None:
        numbers["padded_vocab"] = config.model.padded_vocab(vocab)
        numbers["parameters"] = config.model.parameters(vocab)
    if world_size is not None:
        data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
        numbers["data_parallel"] = data
        numbers["microbatches"] = batch.sequences // (batch.microbatch * data)
    return numbers


def _replay_tokens(config: RunConfig) -> int:
    """Tokens that are replayed, over all phases of the stage; a controller may change them."""
    stage, length = config.stage, config.batch.seq_length
    share, total, position = float(stage.replay.share), 0.0, 0
    times = timeline(stage.phases, stage.tokens, config.tokens_per_step, length)
    for phase, (start, ramp) in zip(stage.phases, times, strict=True):
        after = share if phase.replay is None else float(phase.replay)
        total += share * (start - position) + (share + after) / 2 * ramp
        share, position = after, start + ramp
    return round(length * (total + share * (config.stage_steps * config.batch.sequences - position)))


def show(config: RunConfig, vocab: int | None = None, world_size: int | None = None) -> str:
    """The run as YAML, every key written out, and below it (as comments) the numbers of `derived`."""
    numbers = derived(config, vocab, world_size)
    width = max(map(len, numbers))
    return "\n".join([dump(config), "# derived:", *(f"#   {name:<{width}}  {n:,}" for name, n in numbers.items())])
