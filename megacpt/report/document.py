"""The report as JSON: what the page shows, for programs. docs/forgetting.md explains the keys."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from megacpt import __version__
from megacpt.report.content import Content, Told
from megacpt.report.measures import StreamGap
from megacpt.report.numbers import summary
from megacpt.report.outcome import curve
from megacpt.report.record import RunRecord
from megacpt.report.routing import routing_document
from megacpt.report.tree import Node

FORMAT = 1


def to_json(content: Content) -> str:
    """Return the text; a number that is not finite is null, since JSON has none."""
    document = {
        "format": FORMAT,
        "megacpt": __version__,
        "title": content.title,
        "label": content.label,
        "lineage": [_node(root) for root in content.roots],
        **_line(content.subject),
        "mixture": [asdict(mixture) for mixture in content.mixed],
        "read": [asdict(reading) for reading in content.read],
        "compare": {name: _line(told) for name, told in content.others.items()},
    }
    return json.dumps(_finite(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _line(told: Told) -> dict[str, Any]:
    """What is told of a line: its stages, its matrix, its numbers and its curves."""
    found, measured = told.found, told.measured
    return {
        "stages": [_stage(record) for record in told.line],
        "streams": list(found.streams),
        "homes": found.homes,
        "start": found.start,
        "matrix": found.losses,
        "forgetting": found.forgotten,
        "change": found.changed,
        "average_loss": found.averages,
        "learned": found.learned,
        "forward_transfer": found.forward,
        "summary": summary(found, measured),
        "gaps": [_gap(gap) for gap in measured.gaps],
        "worst": {stream: asdict(worst) for stream, worst in measured.worst.items()},
        "windows": {
            str(window): {stream: asdict(swing) for stream, swing in swings.items()}
            for window, swings in measured.windows.items()
        },
        "held_out": {
            stream: [[point.step, point.tokens, point.bits_per_byte] for point in curve(told.line, stream)]
            for stream in found.streams
        },
        "training": [
            [point.tokens, point.loss, point.rate, point.tokens_per_second]
            for record in told.line
            for point in record.train
        ],
        "routing": routing_document(told.line, told.routed),
    }


def _stage(record: RunRecord) -> dict[str, Any]:
    stage = record.ledger.stage
    return {
        "name": record.name,
        "kind": stage.kind,
        "run": str(record.folder),
        "id": record.ledger.id,
        "start": record.start,
        "end": record.end,
        "complete": record.complete,
        "steps": stage.steps,
        "seq_length": stage.seq_length,
        "batch": stage.batch,
        "schedule": stage.schedule,
        "rate": stage.rate,
        "optimizer": stage.optimizer,
        "consumed": stage.consumed,
        "repeats": stage.repeats,
        "changes": stage.changes,
        "carry": stage.carry,
        "layouts": list(stage.layouts),
        "training_loss": record.ended,
        "tokens_per_second": record.speed,
        "seconds": record.wall_seconds,
        "unreadable_lines": record.unreadable,
    }


def _gap(gap: StreamGap) -> dict[str, Any]:
    return {
        "stage": gap.stage,
        "stream": gap.stream,
        "measurements": len(gap.points),
        **asdict(gap.gap),
        "duration_tokens": gap.duration_tokens,
    }


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.stage.name,
        "kind": node.stage.kind,
        "run": node.folder,
        "id": None if node.ledger is None else node.ledger.id,
        "start": node.start,
        "tokens": node.stage.tokens,
        "subject": node.subject,
        "children": [_node(child) for child in node.children],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
