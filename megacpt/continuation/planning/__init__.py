"""From a stage's mixture and the ledger to the plan of its samples.

A stage reads new streams (`new`) and replays old ones (`replay`), in shares that may change on the way (`shares`).
What it replays, and where it goes on, follows from what the lineage has consumed (`past`).
"""

from __future__ import annotations

from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning.new import in_epochs, new_sources, open_mixture
from megacpt.continuation.planning.past import before_stage, lineage_seed, past_streams
from megacpt.continuation.planning.replay import replay_sources
from megacpt.continuation.planning.shares import with_shares
from megacpt.data.order import derive_key
from megacpt.data.plan import StagePlan
from megacpt.data.tokenizer import Tokenizer


def plan_stage(config: RunConfig, ledger: Ledger | None, tokenizer: Tokenizer) -> StagePlan:
    """Decide which stretches of which streams a stage reads, and in which shares.

    A stream that the lineage has read in the same way before (sample length, subset and order) goes on where it
    stopped. Replay draws from the streams of earlier stages that are not in the stage's own mixture, or from streams
    given from outside.

    Args:
        config: the run of the stage.
        ledger: what the parent has seen; None for a first stage.
        tokenizer: the model's; streams of another are refused.

    Raises:
        ConfigError: if replay is asked for, and there is nothing to replay; if a subset does not fit its stream.
        DataError: if a stream is missing, damaged, or of another tokenizer.
    """
    seed = lineage_seed(config, ledger)
    past = past_streams(ledger)
    streams = open_mixture(config.stage, tokenizer)
    new = new_sources(streams, past, seed, config.batch.seq_length)
    old = replay_sources(config, ledger, past, new, tokenizer)
    key = derive_key(seed, "replay", 0 if ledger is None else len(ledger.stages)) if old else seed
    # The weights of the old sources are those among themselves, until now.
    plan = with_shares(config, StagePlan(config.batch.seq_length, key, (*new, *old)), [s.weight for s in old])
    return in_epochs(plan, streams, past, config.stage_steps * config.batch.sequences)


def old_weights(config: RunConfig, start: Ledger, tokenizer: Tokenizer) -> list[float]:
    """Return the weights of a stage's old sources among themselves; a plan tells them only while some is replayed.

    Args:
        config: the run of the stage.
        start: the ledger at its start, the stage included.
        tokenizer: the model's.

    Raises:
        DataError: if an external stream is missing, damaged, or of another tokenizer.
    """
    before = before_stage(start)
    new = [source for source in start.stage.plan.sources if source.role == "new"]
    return [source.weight for source in replay_sources(config, before, past_streams(before), new, tokenizer)]
