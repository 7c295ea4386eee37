"""The forest of runs, as `megacpt lineage show` prints it."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megacpt.config import dump
from megacpt.continuation.boundary import annealed_config, create_run, first_ledger
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.lineage.forest import grow_forest
from megacpt.continuation.lineage.tree import Drawing
from megacpt.continuation.lineage.words import counted, duration, short_tokens
from megacpt.data.plan import Curriculum, Phase, Segment, Source, StagePlan, Subset
from tests.continuation.conftest import Finish, stage
from tests.continuation.lineage import made
from tests.small import run_config


def show(*paths: Path, width: int = 300, brief: bool = False, encoding: str = "utf-8") -> list[str]:
    """The lines that are printed for `paths`."""
    printed = io.BytesIO()
    file = io.TextIOWrapper(printed, encoding=encoding)
    Console(file=file, width=width).print(Drawing(grow_forest(paths), brief))
    file.flush()
    return printed.getvalue().decode(encoding).splitlines()


def block(lines: list[str], name: str) -> list[str]:
    """The lines about a run, without what stands left of them."""
    bare = [line.lstrip(" │├─●◐○◌◆") for line in lines]
    start = next(i for i, line in enumerate(bare) if line.split("  ")[0].endswith(name))
    ends = (i for i, line in enumerate(lines) if i > start and (not line.strip() or set(line[:20]) & set("●◐○◌◆")))
    return bare[start : next(ends, len(lines))]


def test_a_stage_says_what_it_is(english: Path, streams: dict[str, str], finish: Finish, tmp_path: Path) -> None:
    replay = {"share": "25%", "policy": "seen"}
    python = finish(stage(tmp_path / "python", {"python": streams["python"]}, replay=replay), english)
    config, parent = annealed_config(python, "50%", tmp_path / "release", [])
    finish(config, parent)
    finish(run_config(tmp_path / "unrelated", {"c": streams["c"]}), steps=2)
    waiting = stage(tmp_path / "waiting", {"c": streams["c"]})
    create_run(waiting, first_ledger(waiting, english))

    lines = show(tmp_path)
    ledger = Ledger.read(python)
    epochs = {name: f"({times:.2f} epochs)" for name, times in ledger.stage.repeats.items()}
    assert block(lines, "/python") == [
        f"{tmp_path / 'python'}  {ledger.id}",
        "python (trunk): 4 of 4 steps, 512 tokens, 1,536 in all",
        f"python 384 {epochs['python']}",
        f"replay (seen): english 128 {epochs['replay-english']}",
        "changed: stage.replay.share 0% -> 25%",
        "infinite schedule, rate 0.0055, constant; 2 s on one process",
    ]
    assert block(lines, "/release")[1] == "python-anneal (anneal): 2 of 2 steps, 256 tokens, 1,792 in all"
    assert block(lines, "/release")[-1].startswith("anneal schedule, rate 0.001, done")
    assert block(lines, "/unrelated")[1] == "first (trunk): 2 of 6 steps, 256 tokens, 256 in all"
    assert block(lines, "/waiting")[1:] == [
        "waiting (trunk): 0 of 4 steps, 0 tokens, 1,024 in all",
        "nothing read yet",
        "infinite schedule, not started",
    ]


def test_the_longest_line_goes_straight_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = made.ledger(made.stage("a"))
    second = made.ledger(made.stage("b"), first)
    for name, ledger in (
        ("a", made.at(first, 6)),
        ("b", second),
        ("c", made.ledger(made.stage("c"), second)),
        ("try", made.ledger(made.stage("try", steps=2), first)),
        ("z", made.ledger(made.stage("z", seed=9))),
    ):
        made.write(tmp_path / name, ledger, planned=6 if name == "a" else 4)
    made.write(tmp_path / "b-release", made.ledger(made.stage("b-anneal", kind="anneal"), second))
    told = [line for line in show(Path(), width=100) if not any(word in line for word in ("(", "schedule"))]
    marks = [re.sub(r"  [0-9a-f]{12}$", "", line.rstrip()) for line in told]
    assert marks == ["● a", "├─◐ try", "│   began on step 4 of a", "● b", "│ began on step 4 of a", "├─● b-release",
                     "● c", "", "● z"]  # fmt: skip
    brief = [line.split("  ")[0].rstrip() for line in show(tmp_path, width=80, brief=True)]
    assert brief == ["run", "● a", "├─◐ try", "● b", "├─● b-release", "● c", "● z"]


def test_thirty_stages_fit_into_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, names = None, []
    for number in range(30):
        own = made.stage(f"stage-{number}", layouts=("tp4 pp2 cp1 dp16", "tp8 pp2 cp1 dp8", "tp8 pp4 cp2 dp4"))
        before = made.ledger(own, before)
        made.write(Path(f"runs/{number:02d}"), before)
        side = made.ledger(made.stage(f"release-{number}", kind="anneal"), before)
        made.write(Path(f"runs/{number:02d}-release"), side)
        names += [f"runs/{number:02d}", f"runs/{number:02d}-release"]
    for brief in (False, True):
        lines = show(Path("runs"), width=80, brief=brief)
        assert max(map(len, lines)) <= 80
        told = [name.removeprefix("runs/") if brief else name for name in names]
        assert all(sum(f" {name} " in line for line in lines) == 1 for name in told)
        # The drawing is never wider than one side branch.
        gutters = [line[: len(line) - len(line.lstrip(" │├─●"))] for line in lines]
        assert max(map(len, gutters)) <= 6
        assert len(lines) <= (61 if brief else 6 * 60)


@pytest.mark.parametrize("width", [30, 41, 80])
def test_nothing_is_lost_where_lines_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.chdir(tmp_path)
    first = made.ledger(made.stage("a"))
    long = {f"optim.word{n}": ["before" * n, "after" * n] for n in range(1, 6)}
    made.write(Path("a"), first)
    for name in ("b", "c"):
        made.write(Path(name), made.ledger(made.stage(name, changes=long), first))
    whole, narrow = (
        "".join(re.sub(r"[^\w.>-]", "", line) for line in show(Path(), width=columns)) for columns in (1000, width)
    )
    assert narrow == whole


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    first = made.ledger(made.stage("a"))
    made.write(tmp_path / "a", first)
    made.write(tmp_path / "b", made.ledger(made.stage("b"), first))
    made.write(tmp_path / "c", made.ledger(made.stage("c", kind="anneal"), first))
    text = "\n".join(show(tmp_path, encoding="ascii"))
    assert text.isascii()
    assert "|-* " in text


def test_missing_and_derived_stages(tmp_path: Path) -> None:
    first = made.ledger(made.stage("a"))
    second = made.ledger(made.stage("b"), first, "b")
    told = replace(made.ledger(made.stage("c"), second), parent_path=str(tmp_path / "there/checkpoints/step-00000004"))
    made.write(tmp_path / "runs/c", told)
    (tmp_path / "there/checkpoints/step-00000004").mkdir(parents=True)
    mean = replace(told, parent=told.id, derived={"operation": "average", "of": [made.at(told, 2).id, told.id]})
    made.write(tmp_path / "runs/mean", mean)
    lines = show(tmp_path / "runs")
    assert block(lines, "a (trunk), in none of these folders") == [
        "a (trunk), in none of these folders",
        f"it was {made.PROJECT}/a",
        "known up to step 4: 512 tokens, 512 in all",
        "a 512 (1.00 epochs)",
    ]
    place = tmp_path / "there/checkpoints/step-00000004"
    assert f"│ it was {place} and is still there: name it too" in lines
    ids = f"{made.at(told, 2).id}, {told.id}"
    assert block(lines, "/mean")[1:] == [f"average of 2 checkpoints: {ids}; 1,536 tokens in all"]
    brief = "\n".join(show(tmp_path / "runs", brief=True))
    assert "◌ (b)" in brief
    assert "not here" in brief
    assert "◆ mean" in brief


def test_parts_of_streams_phases_and_controllers(tmp_path: Path) -> None:
    segment = Segment(5, 16, 0, None, Subset(40, "best"), Curriculum("ascending", 4))
    sources = tuple(
        Source(f"s{n}", "/s", f"{n}" * 4, "new", None, 1.0, (segment if n == 0 else Segment(5, 16, 0, None),))
        for n in range(9)
    )
    own = made.stage(
        "many",
        plan=StagePlan(16, 5, sources, (Phase(4, (1.0,) * 9), Phase(8, (2.0,) * 9, 2))),
        consumed={f"s{n}": 16 * (n < 8) for n in range(9)},
        repeats={"s0": 2.0},
        controller={"share": 0.1},
        changes={f"optim.k{n}": [n, None] for n in range(8)},
    )
    lines = block(show(made.write(tmp_path / "many", made.ledger(own), steps=(4,))), "many")
    assert lines[2].startswith("s0 16 (2.00 epochs of 40 windows, best, ascending), s1 16 (0.00 epochs)")
    assert lines[2].endswith(", and 2 streams more (32)")
    assert lines[3] == "shares change 2 times; a controller moves the replay"
    assert lines[4].startswith("changed: optim.k0 0 -> (none), ")
    assert lines[4].endswith(", and 2 more")


def test_a_run_that_became_longer(streams: dict[str, str], finish: Finish, tmp_path: Path) -> None:
    mixture = {"english": streams["english"]}
    finish(run_config(tmp_path / "run", mixture, steps=4))
    finish(run_config(tmp_path / "run", mixture, steps=9), steps=7)
    (tmp_path / "run" / "run.yaml").write_text(dump(run_config(tmp_path / "run", mixture, steps=4)))
    assert any("first (trunk): 7 of 9 steps" in line for line in show(tmp_path))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10k"), (12_345, "12.3k"), (999_499, "999k"), (999_500, "1M"),
     (1_500_000, "1.5M"), (100_663_296_000, "101B"), (2 * 10**13, "20T"), (10**18, "1000000T")],
)  # fmt: skip
def test_short_tokens(number: int, text: str) -> None:
    assert short_tokens(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.4, "3 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (11_100, "3 h 05 min"), (183_600, "2 d 3 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counted() -> None:
    assert [counted(n, "line") for n in (1, 2, 3000)] == ["1 line", "2 lines", "3,000 lines"]
