"""A lineage in which every kind of replay, subset, phase and sample length occurs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megacpt.continuation.boundary import annealed_config
from tests.continuation.conftest import finish_run, stage
from tests.continuation.planned import scored_stream
from tests.small import make_streams, run_config


def _grow(place: Path) -> None:
    """Make streams in ``data`` and nine runs in ``runs``, each with checkpoints after some steps and at its end."""
    streams = make_streams(place / "data")
    streams["scored"] = str(scored_stream(place / "data"))
    runs = place / "runs"

    def continued(name: str, parent: Path, mixture: dict[str, Any], **changes: Any) -> Path:
        config = stage(runs / name, mixture, **changes)
        finish_run(config, parent, steps=1)
        return finish_run(config, parent)

    english, python, c = (streams[name] for name in ("english", "python", "c"))
    best = {"path": streams["scored"], "subset": "50%", "select": "best", "order": "ascending", "parts": 4}
    phases = [{"after": "50%", "weights": {"english": 1, "python": 3}, "ramp": "2 steps"}]
    first = finish_run(run_config(runs / "1-english", {"english": english}, steps=8))
    seen = continued("2-seen", first, {"python": python}, replay={"share": "25%"})
    phased = continued(
        "3-phases", seen, {}, stage={"name": "3", "tokens": 1024, "phases": phases,
                                     "mixture": {"english": english, "python": python}}, steps=8
    )  # fmt: skip
    fresh = continued("4-fresh", phased, {"c": c}, replay={"share": "30%", "policy": "fresh"})
    config, parent = annealed_config(fresh, "50%", runs / "5-release", [])
    finish_run(config, parent)
    size = {"share": "50%", "policy": "reservoir", "size": 40 * 16}
    reservoir = continued("6-reservoir", fresh, {"scored": best}, replay=size, steps=6)
    power = continued("7-power-law", reservoir, {"english": english}, replay={"share": "40%", "policy": "power_law"})
    proxy = {"share": "20%", "policy": "external", "streams": {"wild": {"path": streams["python-valid"]}}}
    outside = continued("8-external", power, {"c": c}, replay=proxy)
    half = {"seq_length": 8, "sequences": 16}
    continued("9-shorter", outside, {"scored": streams["scored"]}, replay={"share": "50%"}, batch=half)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lineage, moved to another folder since: no path in its ledgers is true any more."""
    place = tmp_path_factory.mktemp("lineage") / "before"
    _grow(place)
    return place.rename(place.with_name("after"))


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    """A copy of the lineage: ``data`` with streams, and ``runs``."""
    return Path(shutil.copytree(template, tmp_path / "project"))
