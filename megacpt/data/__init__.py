"""Token streams: tokenise, store, order, mix, replay, batch."""

from __future__ import annotations

from megacpt.data.batches import eval_windows, microbatches
from megacpt.data.plan import Segment, Source, StagePlan
from megacpt.data.stage_data import Location, StageData
from megacpt.data.stream import StreamMeta, TokenStream
from megacpt.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Location",
    "Segment",
    "Source",
    "StageData",
    "StagePlan",
    "StreamMeta",
    "TokenStream",
    "Tokenizer",
    "eval_windows",
    "load_tokenizer",
    "microbatches",
]
