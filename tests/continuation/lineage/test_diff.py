"""What differs between two checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megacpt.continuation.boundary import annealed_config, create_run, first_ledger
from megacpt.continuation.ledger import LEDGER, Ledger
from megacpt.continuation.lineage.beside import draw_diff
from megacpt.continuation.lineage.diff import Diff, StreamRow, compare
from megacpt.errors import CheckpointError
from tests.continuation.conftest import Finish, stage
from tests.continuation.lineage import made


def draw(diff: Diff, width: int = 200) -> list[str]:
    """The lines that are printed."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        for part in draw_diff(diff):
            console.print(part)
    return [line.rstrip() for line in capture.get().splitlines()]


def mirrored(diff: Diff) -> Diff:
    """The same with A and B exchanged."""
    return replace(
        diff,
        a=diff.b,
        b=diff.a,
        streams=tuple(replace(r, a=r.b, b=r.a, a_replayed=r.b_replayed, b_replayed=r.a_replayed) for r in diff.streams),
        settings={key: (b, a) for key, (a, b) in diff.settings.items()},
        circumstances={key: (b, a) for key, (a, b) in diff.circumstances.items()},
    )


def test_a_stage_and_the_release_of_its_parent(
    english: Path, streams: dict[str, str], finish: Finish, tmp_path: Path
) -> None:
    replay = {"share": "25%", "policy": "seen"}
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, replay=replay), english)
    config, parent = annealed_config(english, "50%", tmp_path / "release", [])
    release = finish(config, parent)
    diff = compare(tmp_path / "python", release)
    assert (diff.relation, [s.name for s in diff.common]) == ("parted", ["first"])
    assert [s.name for s in diff.a.alone] == ["python"]
    assert [s.name for s in diff.b.alone] == ["first-anneal"]
    hashes = {s.name: s.content_hash for stage in Ledger.read(python).stages for s in stage.plan.sources}
    assert diff.streams == (
        StreamRow("english", hashes["english"], 1024 + 128, 1024 + 512, 128, 0),
        StreamRow("python", hashes["python"], 384, 0, 0, 0),
    )
    assert diff.settings["stage.kind"] == ("trunk", "anneal")
    assert diff.settings["schedule.kind"] == ("infinite", "anneal")
    assert diff.settings["mixture.python"] == ("75%", None)
    assert diff.settings["replay.replay-english"] == ("seen", None)
    assert not any(key.startswith(("model", "optim", "batch", "tokenizer")) for key in diff.settings)
    assert set(diff.circumstances) == {"run"}

    lines = draw(diff)
    assert "last in common: step 8 of first, 1,024 tokens" in lines
    assert "  python (trunk): 4 steps, 512 tokens" in lines
    assert "    python 384, replay-english 128" in lines
    english_row = next(line for line in lines if line.startswith("english "))
    assert english_row.split() == ["english", "1,152", "128", "1,536", "0", "+384"]
    assert max(map(len, draw(diff, 80))) <= 80


def test_an_ancestor_a_later_step_and_a_run_that_only_began(
    streams: dict[str, str], finish: Finish, tmp_path: Path, english: Path
) -> None:
    python = stage(tmp_path / "python", {"python": streams["python"]})
    early, late = finish(python, english, steps=2), finish(python, english, steps=4)
    assert compare(english, late).relation == "a before b"
    diff = compare(early, late)
    assert diff.relation == "a before b"
    assert [(s.name, s.steps, s.tokens, s.consumed) for s in diff.b.alone] == [("python", 2, 256, {"python": 256})]
    assert diff.a.alone == ()
    assert "B descends from A (step 2 of python, 1,280 tokens)" in draw(diff)
    assert diff.settings == {}

    branch = finish(stage(tmp_path / "c", {"c": streams["c"]}), early)
    parted = compare(branch, tmp_path / "python")
    assert parted.relation == "parted"
    assert [(s.name, s.steps) for s in parted.common] == [("first", 8), ("python", 2)]
    assert [(s.name, s.steps) for s in parted.b.alone] == [("python", 2)]

    waiting = stage(tmp_path / "waiting", {"c": streams["c"]})
    create_run(waiting, first_ledger(waiting, late))
    assert compare(late, tmp_path / "waiting").relation == "a before b"


def test_the_same_seen_elsewhere(tmp_path: Path) -> None:
    one = made.ledger(made.stage("a"))
    other = one.with_stage(layouts=("tp8 pp1 cp1 dp2",), seconds=7200.0, versions={"megacpt": "2"})
    diff = compare(made.write(tmp_path / "one", one), made.write(tmp_path / "other", other))
    assert (diff.relation, diff.settings, diff.same_tensors) == ("same", {}, None)
    lines = draw(diff)
    assert "both have seen the same, in the same order, under the same settings" in lines
    rows = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines if line.startswith(("lay", "sec", "ver"))}
    assert rows == {
        "layouts": ["one process", "tp8 dp2"],
        "seconds": ["60 s", "2 h 00 min"],
        "versions.megacpt": ["1", "2"],
    }


def test_tensors_are_compared_by_their_hashes(tmp_path: Path) -> None:
    found = made.ledger(made.stage("a"))
    checkpoints = [made.write_checkpoint(tmp_path / name / "step-00000004", found) for name in ("one", "two", "three")]
    for folder, files in zip(checkpoints, ({"__0_0": "x"}, {"__0_0": "y"}, {"__0_0": "x", "__1_0": "z"}), strict=True):
        content = {f"{name}.distcp": {"bytes": 1, "sha256": text} for name, text in files.items()}
        for name in content:
            (folder / name).write_text("1")
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": content}))
    one, two, three = checkpoints
    found_equal = [compare(one, other).same_tensors for other in (one, two, three)]
    assert found_equal == [True, False, None]
    assert "weights and optimizer: different" in draw(compare(one, two))


def test_unrelated_and_averaged(tmp_path: Path) -> None:
    one, other = made.ledger(made.stage("a")), made.ledger(made.stage("b", seed=6))
    first = made.write(tmp_path / "a", one)
    diff = compare(first, made.write(tmp_path / "b", other))
    assert (diff.relation, diff.common) == ("unrelated", ())
    assert "they have no stage in common" in draw(diff)
    mean = replace(one, parent=one.id, derived={"operation": "average", "of": ["x", one.id], "weights": [0.5, 0.5]})
    diff = compare(first, made.write(tmp_path / "mean", mean))
    assert diff.relation == "a before b"
    assert diff.settings["derived.operation"] == (None, "average")
    assert f"   average of 2 checkpoints: x, {one.id}" in draw(diff)


def test_the_other_way_round_is_the_mirror(
    english: Path, streams: dict[str, str], finish: Finish, tmp_path: Path
) -> None:
    paths = [english]
    paths.append(finish(stage(tmp_path / "python", {"python": streams["python"]}), english))
    paths.append(finish(stage(tmp_path / "c", {"c": streams["c"]}, optim={"peak_lr": 2e-3}), english, steps=2))
    for a in paths:
        for b in paths:
            there, back = compare(a, b), compare(b, a)
            assert mirrored(there).relation == back.relation
            assert {**mirrored(there).settings} == back.settings
            assert set(mirrored(there).streams) == set(back.streams)
            assert there.common == back.common
            for diff in (there, back):
                whole = sum(s.tokens for s in (*diff.common, *diff.a.alone)), sum(row.a for row in diff.streams)
                assert whole == (diff.a.ledger.tokens,) * 2
    json.dumps(compare(*paths[1:]).to_dict())


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    good = made.write(tmp_path / "good", made.ledger(made.stage("a")))
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        compare(good, tmp_path / "nowhere")
    bad = made.write(tmp_path / "bad", made.ledger(made.stage("a")))
    ledger = bad / "checkpoints/step-00000004" / LEDGER
    ledger.write_text(ledger.read_text().replace('"tokens": 512', '"tokens": 513'))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        compare(good, bad)
