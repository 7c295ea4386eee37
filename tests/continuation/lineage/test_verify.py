"""Proving ledgers: an honest lineage passes, and whatever is changed in it is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from megacpt.continuation.boundary import START
from megacpt.continuation.ledger import LEDGER, Ledger, StageRecord
from megacpt.continuation.lineage.forest import grow_forest
from megacpt.continuation.lineage.recount import Claim, share_stages
from megacpt.continuation.lineage.verify import Bars, Watch, verify
from megacpt.data.course import Course
from megacpt.data.plan import Phase, Segment, Source
from megacpt.data.stage_data import StageData
from megacpt.data.stream import META_FILE, TokenStream
from tests.continuation.lineage import made

Change = Callable[[StageRecord], StageRecord]


def ledgers(run: Path) -> list[Path]:
    """The ledgers of a run, its start first."""
    return [run / START, *sorted(run.glob("checkpoints/*/" + LEDGER))]


def change(run: Path, how: Change, files: list[Path] | None = None) -> None:
    """Change the current stage in ledgers of a run (by default in all), and give them the ids that they then have."""
    for path in files if files is not None else ledgers(run):
        found = Ledger.read_file(path)
        path.write_text(replace(found, stages=(*found.stages[:-1], how(found.stage))).to_json())


def change_source(name: str, **values: Any) -> Change:
    """A change of one source of the plan."""

    def how(stage: StageRecord) -> StageRecord:
        sources = tuple(replace(s, **values) if s.name == name else s for s in stage.plan.sources)
        return replace(stage, plan=replace(stage.plan, sources=sources))

    return how


def newest(run: Path) -> Path:
    """The ledger of a run's newest checkpoint."""
    return ledgers(run)[-1]


def wrong(project: Path, quick: bool = False) -> str:
    """What is found wrong, a line each."""
    return "\n".join(verify([project], quick).wrong)


@pytest.mark.parametrize("quick", [False, True])
def test_an_honest_lineage_is_proven(project: Path, quick: bool) -> None:
    verdict = verify([project], quick)
    assert verdict.wrong == []
    assert verdict.unproven == []
    stages = {node.folder: node.stage for node in grow_forest([project])}
    samples = sum(stage.steps * stage.batch for stage in stages.values())
    tokens = sum(stage.tokens for stage in stages.values())
    assert len(stages) == 9
    assert verdict.proven[0] == "25 ledgers: ids and numbers fit, 8 links to parents"
    assert verdict.proven[1].startswith("5 streams: ")
    counted = "computed from the shares" if quick else "located one by one"
    assert verdict.proven[2] == (
        f"9 stages: {samples} samples, {counted}, make the {tokens:,} tokens and all repeats that the ledgers claim"
    )


def test_part_of_a_lineage_says_what_it_rests_on(project: Path) -> None:
    verdict = verify([project / "runs/4-fresh", project / "runs/5-release"], data=[project / "data"])
    assert verdict.wrong == []
    assert verdict.proven[2].startswith("5 stages: ")  # what its ledgers remember of earlier ones is counted too
    parent = Ledger.read_file(newest(project / "runs/3-phases")).id
    assert [text.split(",")[0] for text in verdict.unproven] == [f"{project / 'runs/4-fresh'} began on {parent}"]


def test_only_checkpoints_deleted_by_retention_are_missing(project: Path) -> None:
    for run in sorted((project / "runs").iterdir())[:6]:
        shutil.rmtree(run / "checkpoints")
    verdict = verify([project])
    assert (verdict.wrong, verdict.unproven) == ([], [])


def test_progress_reaches_its_end(project: Path) -> None:
    class Sum(Watch):
        totals: list[int]
        done: list[int]

        def __init__(self) -> None:
            self.totals, self.done = [], []

        def begin(self, what: str, total: int) -> None:
            assert what
            self.totals.append(total)
            self.done.append(0)

        def advance(self, units: int) -> None:
            self.done[-1] += units

    watch = Sum()
    verify([project], watch=watch)
    assert watch.done == watch.totals
    assert all(watch.totals)
    with Progress(console=Console(quiet=True)) as progress:
        verify([project], watch=Bars(progress))
    assert [(task.completed, task.finished) for task in progress.tasks] == [(total, True) for total in watch.totals]


def test_numbers_that_are_not_those_of_the_samples(project: Path) -> None:
    run = project / "runs/2-seen"
    stage = Ledger.read_file(newest(run)).stage
    assert stage.consumed == {"python": 384, "replay-english": 128}
    moved = {"python": 368, "replay-english": 144}
    change(run, lambda stage: replace(stage, consumed=moved), [newest(run)])
    said = wrong(project)
    assert f"{newest(run)}: stage 2-seen claims 368 tokens of python, and its samples have 384" in said
    assert "claims 144 tokens of replay-english, and its samples have 128" in said
    assert wrong(project, quick=True) == said

    honest = replace(stage, repeats={**stage.repeats, "python": 0.5})
    change(run, lambda _: honest, [newest(run)])
    times = stage.repeats["python"]
    assert f"claims 0.5 epochs of python, and its samples make {times:.6g}" in wrong(project)

    change(run, lambda _: replace(stage, consumed={**stage.consumed, "c": 16}), [newest(run)])
    assert "claims tokens of c, which its plan does not have" in wrong(project)

    change(run, lambda _: replace(stage, tokens=528), [newest(run)])
    assert f"{newest(run)}: 4 steps make 512 tokens, and it says 528" in wrong(project)

    change(run, lambda _: replace(stage, steps=5, tokens=640), [newest(run)])
    assert f"{newest(run)} says step 5, and its folder another" in wrong(project)


@given(st.data())
@settings(max_examples=15, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_no_count_of_any_stage_can_be_changed_unnoticed(project: Path, data: st.DataObject) -> None:
    paths = [path for run in sorted((project / "runs").iterdir()) for path in ledgers(run)[1:]]
    path = data.draw(st.sampled_from(paths))
    before = path.read_text()
    stage = Ledger.read_file(path).stage
    name = data.draw(st.sampled_from(sorted(stage.consumed)))
    more = data.draw(st.integers(-stage.consumed[name], 1000).filter(bool))
    consumed = {**stage.consumed, name: stage.consumed[name] + more}
    change(path.parent, lambda stage: replace(stage, consumed=consumed), [path])
    assert f"{path}: stage {stage.name} claims {consumed[name]:,} tokens of {name}" in wrong(project, quick=True)
    path.write_text(before)


def test_other_weights_in_the_plan(project: Path) -> None:
    run = project / "runs/2-seen"
    change(run, change_source("python", weight=0.5))
    said = wrong(project, quick=True)
    counts = Course([source.weight for source in Ledger.read_file(run / START).stage.plan.sources]).counts(32)
    assert counts[0] < 24
    assert f"{newest(run)}: stage 2-seen claims 384 tokens of python, and its samples have {counts[0] * 16}" in said


def test_a_plan_that_differs_between_start_and_checkpoint(project: Path) -> None:
    run = project / "runs/4-fresh"
    change(run, lambda stage: replace(stage, seed=9), [newest(run)])
    assert f"{newest(run)} is of another run than {run / START}: stage.seed differ" in wrong(project)


def test_samples_read_again_or_never_consumed(project: Path) -> None:
    run = project / "runs/3-phases"
    english = next(s for s in Ledger.read_file(run / START).stage.plan.sources if s.name == "english")
    (segment,) = english.segments
    assert segment.start == 64
    change(run, change_source("english", segments=(replace(segment, start=10),)))
    assert f"{run}: stage 3: english begins at sample 10 of its order, which was left at 64" in wrong(project)

    run = project / "runs/2-seen"
    more = Segment(segment.key, 16, 0, 65)
    change(run, change_source("replay-english", segments=(more,)))
    expected = f"{run}: stage 2-seen: replay-english replays samples that the lineage had not consumed"
    assert expected in wrong(project, quick=True)


@pytest.mark.parametrize(
    ("name", "source", "offset", "says"),
    [
        ("2-seen", "python", 0, "come twice in an epoch"),
        ("2-seen", "replay-english", 0, "come twice in an epoch"),
        ("4-fresh", "replay-python", 1 << 40, "are not inside their stream"),
        ("6-reservoir", "replay-c", -16, "are not inside their stream"),
        ("6-reservoir", "scored", 8, "are not inside their stream"),
        ("7-power-law", "replay-python", "unread", "were never consumed"),
    ],
)
def test_samples_are_looked_at_one_by_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, offset: int | str, says: str
) -> None:
    """The positions of two samples are replaced by another one; counts and shares stay as they are."""
    plan = Ledger.read_file(project / "runs" / name / START).stage.plan
    number = [s.name for s in plan.sources].index(source)
    honest = StageData.locate_many

    def unread(data: StageData) -> int:
        windows = (data.streams[number].tokens - 1) // 16
        read = {honest(data, np.array([g]))[1][0] // 16 for g in range(512) if data.locate(g).source == number}
        return 16 * next(w for w in range(windows) if w not in read)

    def crooked(data: StageData, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, offsets = honest(data, g)
        if [s.name for s in data.plan.sources] == [s.name for s in plan.sources]:
            here = np.flatnonzero(sources == number)
            taken = offsets[here[0]] if offset == 0 else unread(data) if offset == "unread" else offset
            offsets[here[:2]] = taken
        return sources, offsets

    assert wrong(project) == ""
    monkeypatch.setattr(StageData, "locate_many", crooked)
    said = wrong(project)
    assert f"{newest(project / 'runs' / name)}: stage {name}: " in said
    assert f"samples of {source} {says}" in said
    assert wrong(project, quick=True) == ""


def test_a_ledger_edited_by_hand(project: Path) -> None:
    path = newest(project / "runs/8-external")
    path.write_text(path.read_text().replace('"seed": 5', '"seed": 6'))
    assert wrong(project).startswith(f"{path} was changed after it was written: its id is ")


def test_small_files_are_compared_with_the_manifest(project: Path) -> None:
    checkpoint = newest(project / "runs/8-external").parent
    text = (checkpoint / LEDGER).read_bytes()
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "files": {LEDGER: entry}}))
    assert wrong(project) == ""
    manifest.write_text(json.dumps({"format": 1, "files": {LEDGER: {**entry, "sha256": "0" * 64}}}))
    assert f"{checkpoint / LEDGER} has changed since it was written" in wrong(project)
    manifest.write_text(json.dumps({"format": 1, "files": {"__0_0.distcp": entry}}))
    assert f"{checkpoint / '__0_0.distcp'} is missing" in wrong(project)


def test_a_changed_stream_is_named_and_its_stages_are_not_counted(project: Path) -> None:
    stream = TokenStream.open(project / "data/c")
    content = bytearray(stream.indexed.bin_path.read_bytes())
    content[-7] ^= 1
    stream.indexed.bin_path.write_bytes(content)
    verdict = verify([project])
    (said,) = verdict.wrong
    assert said.startswith(f"the content of {stream.indexed.bin_path} (or its .idx) has changed: its hash is ")
    assert "stage 4-fresh was not counted: c are not as they were" in verdict.unproven
    assert sum("was not counted" in text for text in verdict.unproven) == 6
    assert wrong(project, quick=True) == ""  # the size is what it was

    stream.indexed.bin_path.write_bytes(content[:-2])
    assert f"{stream.indexed.bin_path} has" in wrong(project, quick=True)


def test_a_lost_stream_and_one_that_moved(project: Path, tmp_path: Path) -> None:
    (project / "data/python").rename(tmp_path / "elsewhere")
    (said,) = verify([project]).wrong
    assert said.startswith("the stream python (content hash ")
    assert "name the folder that it is in with --data" in said
    assert verify([project], data=[tmp_path / "elsewhere"]).wrong == []
    # Another stream in its place is not taken for it.
    shutil.copytree(project / "data/c", project / "data/python")
    assert verify([project]).wrong == [said]


def test_a_stream_of_another_tokenizer(project: Path) -> None:
    meta = project / "data/c" / META_FILE
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps({**content, "tokenizer_fingerprint": "0" * 64}))
    assert f"the stream {project / 'data/c'} was made with the tokenizer {'0' * 12}" in wrong(project)


def test_a_parent_that_is_not_the_one_that_is_named(tmp_path: Path) -> None:
    first = made.ledger(made.stage("a"))
    where = tmp_path / "runs/a/checkpoints/step-00000004"
    made.write(tmp_path / "runs/a", first.with_stage(seed=8))
    made.write(tmp_path / "runs/b", replace(made.ledger(made.stage("b"), first), parent_path=str(where)))
    said = (
        f"{tmp_path / 'runs/b'} began on the checkpoint {first.id}, and {tmp_path / 'runs/a'}, which it names, is not"
    )
    assert said in wrong(tmp_path / "runs")


def test_a_rate_that_jumps(tmp_path: Path) -> None:
    first = made.ledger(made.stage("a"))
    made.write(tmp_path / "a", first)
    made.write(tmp_path / "b", made.ledger(made.stage("b", entry_rate=0.5), first))
    assert f"{tmp_path / 'b'} began at the rate 0.5, and its parent stopped at 0.001" in wrong(tmp_path)


def test_a_stage_under_a_controller_is_counted_once() -> None:
    start = made.stage("a", steps=2, controller={"share": 0.1})
    sources = (*start.plan.sources, Source("r", "/r", "r", "replay", "fresh", 0.0, (Segment(5, 16, 0, None),)))
    one, two, other = Phase(16, (0.9, 0.1)), Phase(32, (0.8, 0.2)), Phase(8, (0.5, 0.5))
    courses: list[tuple[Phase, ...]] = [(), (one,), (one, two), (other,)]
    plans = [replace(start.plan, sources=sources, phases=phases) for phases in courses]
    claims = [Claim(replace(start, steps=steps, plan=plan), f"{steps}")
              for steps, plan in zip((2, 4, 6, 5), plans, strict=True)]  # fmt: skip
    shared = share_stages([*claims, *claims])
    assert sorted([claim.where for claim in stage.claims] for stage in shared) == [["2", "4", "6"], ["5"]]
    assert len(next(stage for stage in shared if len(stage.claims) == 3).plan.phases) == 2
