"""The ledger of weights that were not trained here: where a lineage begins when it begins elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacpt.config import ModelConfig
from megacpt.continuation.boundary import tokenizer_record, versions
from megacpt.continuation.ledger import CONVERTED, Ledger, StageRecord
from megacpt.data.plan import StagePlan
from megacpt.data.tokenizer import Tokenizer
from megacpt.optim.schedules import Schedule

# A rate of 0 over no tokens: what the weights were trained with is not known.
_UNKNOWN = Schedule("constant", 0.0, 0.0, 0.0, 0, 0, 0, "linear", 0.0, 0)


def converted_ledger(model: ModelConfig, tokenizer: Tokenizer, operation: str, details: Mapping[str, Any]) -> Ledger:
    """Return the ledger of a checkpoint whose weights come from elsewhere: one stage, in which nothing was seen.

    A stage that continues it begins with a new optimizer state, has to warm up, and orders its data by its own seed.

    Args:
        model: the network.
        tokenizer: the model's.
        operation: what made the checkpoint, such as ``from-hf``.
        details: what went into it, as plain values for JSON: names, revisions, hashes.
    """
    stage = StageRecord(
        name=operation,
        kind=CONVERTED,
        run="",
        tokens=0,
        steps=0,
        seq_length=model.max_seq_length,
        batch=0,
        plan=StagePlan(model.max_seq_length, 0, ()),
        consumed={},
        repeats={},
        schedule=_UNKNOWN.to_dict(),
        entry_rate=None,
        rate=None,
        phase=None,
        optimizer={},
        precision="float32",
        seed=0,
        layouts=(),
        versions=versions(),
        seconds=0.0,
    )
    return Ledger(
        parent=None,
        parent_path=None,
        tokenizer=tokenizer_record(tokenizer),
        model=model.model_dump(mode="json"),
        stages=(stage,),
        derived={"operation": operation, **details},
    )
