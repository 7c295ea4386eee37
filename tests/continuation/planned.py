"""Plans of stages, and what they read."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megacpt.config import RunConfig
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.planning import plan_stage
from megacpt.data.plan import Source, StagePlan
from megacpt.data.prepare import prepare
from megacpt.data.stage_data import StageData
from megacpt.data.tokenizer import load_tokenizer


def plan_of(config: RunConfig, parent: Path | None = None) -> StagePlan:
    """The plan of a stage on the checkpoint `parent`."""
    return plan_stage(config, None if parent is None else Ledger.read(parent), load_tokenizer("bytes"))


def offsets(plan: StagePlan, samples: int, source: int) -> list[int]:
    """The offsets of the samples of one source among the first samples of a stage."""
    data = StageData(plan)
    located = [data.locate(g) for g in range(samples)]
    return [location.offset for location in located if location.source == source]


def by_name(plan: StagePlan) -> dict[str, Source]:
    """The sources of a plan by name."""
    return {source.name: source for source in plan.sources}


def shares(plan: StagePlan, samples: int) -> dict[str, float]:
    """The parts that the sources have in the first samples of a stage."""
    return {s.name: n / samples for s, n in zip(plan.sources, StageData(plan).counts(samples), strict=True)}


def scored_stream(folder: Path, documents: int = 60) -> Path:
    """Prepare a byte stream of documents of 16 tokens, each with a score of its own; return its folder."""
    draw = random.Random(1)
    scores = draw.sample(range(documents), documents)
    lines = [json.dumps({"text": f"{score:03d} wise words.", "quality": score}) for score in scores]
    (folder / "scored.jsonl").write_text("\n".join(lines))
    prepare([folder / "scored.jsonl"], "bytes", folder / "scored", workers=1, progress=False, score="quality")
    return folder / "scored"


def scores(plan: StagePlan, samples: int) -> list[int]:
    """The scores of the first samples of a stage on a `scored_stream`, whose documents are one sample each."""
    data = StageData(plan)
    return [int(bytes(data.tokens(g)[:3].astype("uint8"))) for g in range(samples)]
