"""Checkpoints appear when they are complete, damaged ones are passed over, and retention keeps what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.checkpoint.store import Retention, checkpoint_step, checkpoints, find_checkpoint
from megacpt.errors import CheckpointError
from tests.pool import Pools

CASES = "tests.checkpoint.cases"
STEPS = st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True).map(sorted)


@pytest.fixture(scope="module")
def saved(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """A run with checkpoints at steps 1, 2 and 3, and the hashes of what was saved."""
    run = tmp_path_factory.mktemp("saved") / "run"
    (hashes,) = pools(1).run(f"{CASES}:save", run=str(run), steps=[1, 2, 3])
    return run, hashes


@pytest.fixture
def run(saved: tuple[Path, list[dict[str, str]]], tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _tensors(run: Path, step: int) -> Path:
    return next((run / "checkpoints" / f"step-{step:08d}").glob("*.distcp"))


# Retention: a pure function of steps and scores.


@given(STEPS, st.integers(1, 5), st.none() | st.integers(1, 7), st.none() | st.integers(1, 3), st.data())
def test_retention_keeps_exactly_what_a_rule_names(
    steps: list[int], last: int, every: int | None, best: int | None, data: st.DataObject
) -> None:
    scores = data.draw(st.dictionaries(st.sampled_from(steps), st.floats(0, 9, allow_nan=False)))
    gone = set(Retention(last, every, best).superfluous(data.draw(st.permutations(steps)), scores))
    kept = set(steps) - gone
    assert gone <= set(steps)
    assert kept >= set(steps[-last:])
    better = {s: sum((scores[o], o) < (scores[s], s) for o in scores) for s in scores}
    for step in kept - set(steps[-last:]):
        assert (every is not None and step % every == 0) or (best is not None and better.get(step, best) < best)
    for step in gone:
        assert every is None or step % every
        assert best is None or better.get(step, best) >= best


@given(STEPS, st.integers(1, 7))
def test_retention_without_a_last_keeps_everything(steps: list[int], every: int) -> None:
    assert Retention(None, every, 1).superfluous(steps, {}) == []


# What is in a run folder.


def test_they_are_listed_by_step_not_by_name(tmp_path: Path) -> None:
    steps = [123456789, 5, 99999999, 100000000]
    for step in steps:
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    for other in (".step-00000007.partial", "step-7", "step-00000008.old", "notes"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == sorted(steps)
    assert checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match="not named like a checkpoint"):
        checkpoint_step(tmp_path)


def test_a_run_folder_means_its_newest(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000003"
    assert find_checkpoint(run) == newest
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(newest.with_name("step-00000001")).name == "step-00000001"


@pytest.mark.parametrize("how", ["no manifest", "no tensors", "truncated"])
def test_a_run_folder_means_its_newest_whole_one(run: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    newest = run / "checkpoints" / "step-00000003"
    if how == "truncated":
        with _tensors(run, 3).open("ab") as file:
            file.truncate(100)
    else:
        (newest / "manifest.json" if how == "no manifest" else _tensors(run, 3)).unlink()
    assert find_checkpoint(run).name == "step-00000002"
    assert "damaged checkpoint passed over" in caplog.text
    assert str(newest) in caplog.text


def test_places_that_hold_no_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: give a run folder"):
        find_checkpoint(tmp_path)
    for path in checkpoints(run):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint of .*run is damaged .*manifest\.json is missing"):
        find_checkpoint(run)
    with pytest.raises(CheckpointError, match=r"step-00000003 is no complete checkpoint"):
        find_checkpoint(run / "checkpoints" / "step-00000003")


# Loading.


def test_what_is_loaded_is_what_was_saved(pools: Pools, saved: tuple[Path, list[dict[str, str]]]) -> None:
    run, hashes = saved
    for number, expected in enumerate(hashes, 1):
        folder = run / "checkpoints" / f"step-{number:08d}"
        assert pools(1).run(f"{CASES}:load", folder=str(folder)) == [expected]
    assert len({tuple(sorted(found.items())) for found in hashes}) == 3


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "__0_0.distcp", "ledger.json"])
def test_loading_names_the_damaged_file(pools: Pools, run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000003" / name
    _flip(path)
    (said,) = pools(1).run(f"{CASES}:load_error", folder=str(path.parent))
    assert f"CheckpointError: the checkpoint is damaged: {path} has changed" in said
    path.unlink()
    (said,) = pools(1).run(f"{CASES}:load_error", folder=str(path.parent))
    assert f"{path} is missing" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_newest_good_one(pools: Pools, run: Path, ranks: int) -> None:
    case = f"{CASES}:newest"
    assert pools(ranks).run(case, run=str(run)) == [("step-00000003", [])] * ranks
    _flip(_tensors(run, 3))
    (name, warnings), *others = pools(ranks).run(case, run=str(run))
    assert name == "step-00000002"
    assert len(warnings) == 1
    assert str(_tensors(run, 3)) in warnings[0]
    assert others == [("step-00000002", [])] * (ranks - 1)
    (run / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    (name, warnings), *_ = pools(ranks).run(case, run=str(run))
    assert (name, len(warnings)) == ("step-00000001", 2)


def test_no_good_one_is_an_error_and_none_at_all_is_not(pools: Pools, run: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _flip(_tensors(run, step))
    (said,) = pools(1).run(f"{CASES}:newest_error", run=str(run))
    assert f"CheckpointError: every checkpoint in {run / 'checkpoints'} is damaged" in said
    assert str(_tensors(run, 3)) in said
    assert pools(1).run(f"{CASES}:newest", run=str(tmp_path / "new")) == [(None, [])]


# Saving.


def test_unfinished_folders_are_ignored_and_then_removed(pools: Pools, run: Path) -> None:
    for step in (3, 9):
        left = run / "checkpoints" / f".step-{step:08d}.partial"
        shutil.copytree(run / "checkpoints" / "step-00000003", left)
    assert pools(1).run(f"{CASES}:newest", run=str(run)) == [("step-00000003", [])]
    pools(1).run(f"{CASES}:save", run=str(run), steps=[1])
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003"]


def test_saving_a_step_again_replaces_it(pools: Pools, run: Path, saved: tuple[Path, list[dict[str, str]]]) -> None:
    _flip(_tensors(run, 1))
    pools(1).run(f"{CASES}:save", run=str(run), steps=[1])
    folder = run / "checkpoints" / "step-00000001"
    assert pools(1).run(f"{CASES}:load", folder=str(folder)) == [saved[1][0]]


def test_retention_acts_after_each_save(pools: Pools, tmp_path: Path) -> None:
    rule, scores = {"last": 1, "every": 3, "best": 1}, {1: 9.0, 2: 1.0}
    pools(1).run(f"{CASES}:save", run=str(tmp_path), steps=[1, 2, 3, 4, 5], retention=rule, scores=scores)
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [2, 3, 5]
    assert pools(1).run(f"{CASES}:newest", run=str(tmp_path)) == [("step-00000005", [])]


def test_a_damaged_one_does_not_take_the_place_of_a_good_one(pools: Pools, run: Path) -> None:
    """A run that resumes behind a damaged checkpoint keeps what it saves on the way there."""
    _flip(_tensors(run, 3))
    pools(1).run(f"{CASES}:save", run=str(run), steps=[2], retention={"last": 1})
    assert [checkpoint_step(path) for path in checkpoints(run)] == [2, 3]
    assert pools(1).run(f"{CASES}:newest", run=str(run))[0][0] == "step-00000002"


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_the_background_is_the_same_as_at_once(pools: Pools, tmp_path: Path, ranks: int) -> None:
    files, layout = {}, {"tensor": ranks}
    for asynchronous in (False, True):
        run = tmp_path / str(asynchronous)
        pools(ranks).run(f"{CASES}:save", run=str(run), steps=[1, 2], asynchronous=asynchronous, parallel=layout)
        for path in run.rglob("*.distcp"):
            files[asynchronous, str(path.relative_to(run))] = path.read_bytes()
    names = {name for _, name in files}
    assert len(names) >= 2 * ranks
    for name in names:
        assert files[False, name] == files[True, name]


def test_in_the_background_it_appears_when_complete_and_is_of_its_moment(pools: Pools, tmp_path: Path) -> None:
    (found,) = pools(1).run(f"{CASES}:save_in_background", run=str(tmp_path))
    assert found["during"] is False
    assert {"ledger.json", "manifest.json", ".metadata"} <= set(found["files"])
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert pools(1).run(f"{CASES}:load", folder=str(folder)) == [found["saved"]]
    assert found["later"] != found["saved"]


def test_one_that_was_given_up_leaves_nothing_to_the_next(pools: Pools, tmp_path: Path) -> None:
    (saved,) = pools(1).run(f"{CASES}:save_after_one_given_up", run=str(tmp_path))
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert pools(1).run(f"{CASES}:load", folder=str(folder), model={"ffn": 96}) == [saved]
