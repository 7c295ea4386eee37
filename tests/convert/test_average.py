"""The mean of checkpoints, block by block."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.checkpoint.store import checkpoints
from megacpt.continuation.ledger import Ledger
from megacpt.convert.average import exponential, last_checkpoints, uniform
from megacpt.errors import CheckpointError, ConfigError
from tests.cli.command import finish, launch_ranks
from tests.cli.command import megacpt as command
from tests.pool import Pools
from tests.small import make_streams, run_mapping

CASES = "tests.convert.cases"
TENSOR = {"parallel": {"tensor": 2}}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_streams(tmp_path_factory.mktemp("streams"))


@pytest.fixture(scope="module")
def run(pools: Pools, streams: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after the steps 2, 4 and 6."""
    config = run_mapping(tmp_path_factory.mktemp("runs") / "english", {"english": streams["english"]})
    return Path(pools(1).run(f"{CASES}:make_run", config=config)[0])


@pytest.fixture(scope="module")
def sharded(pools: Pools, streams: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks that share each matrix."""
    config = run_mapping(tmp_path_factory.mktemp("runs") / "sharded", {"english": streams["english"]}, **TENSOR)
    return Path(pools(2).run(f"{CASES}:make_run", config=config)[0])


def branch(pools: Pools, parent: Path, folder: Path, stream: str, name: str) -> Path:
    """A stage of its own on a run."""
    config = run_mapping(folder, {name: stream}, steps=2)
    config["stage"]["name"] = name
    return Path(pools(1).run(f"{CASES}:make_run", config=config, parent=str(checkpoints(parent)[-1]))[0])


def texts(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mean_of_sharded_checkpoints_is_that_of_gathered_ones(
    pools: Pools, sharded: Path, tmp_path: Path, ranks: int
) -> None:
    sources, shares = texts(checkpoints(sharded)), [1.0, 2.0, 5.0]
    made = pools(ranks).run(f"{CASES}:averaged", sources=sources, out=str(tmp_path / "mean"), weights=shares)
    (off,) = pools(1).run(f"{CASES}:same_as_gathered", made=made[0]["checkpoint"], sources=sources, shares=shares)
    assert len(off) > 10
    # Both round a float64 mean to float32; the order of the sum may turn the last place of a tie.
    assert max(off.values()) <= 1
    assert sum(value > 0 for value in off.values()) <= 1


def test_layouts_may_differ(pools: Pools, run: Path, sharded: Path, tmp_path: Path) -> None:
    sources = texts([checkpoints(run)[1], checkpoints(sharded)[2]])
    made = pools(2).run(f"{CASES}:averaged", sources=sources, out=str(tmp_path / "mean"))[0]["checkpoint"]
    (off,) = pools(1).run(f"{CASES}:same_as_gathered", made=made, sources=sources, shares=[1, 1])
    assert max(off.values()) <= 1


def test_one_checkpoint_alone_stays_as_it_is(pools: Pools, run: Path, tmp_path: Path) -> None:
    sources = texts(checkpoints(run))
    made = pools(1).run(f"{CASES}:averaged", sources=sources, out=str(tmp_path / "mean"), weights=[0, 1, 0])
    same = pools(1).run(f"{CASES}:same_as_gathered", made=made[0]["checkpoint"], sources=[sources[1]], shares=[1])
    assert set(same[0].values()) == {0.0}


def test_every_rank_makes_its_part_and_holds_one_block(pools: Pools, sharded: Path, tmp_path: Path) -> None:
    sources = texts(checkpoints(sharded))
    results = pools(2).run(f"{CASES}:averaged", sources=sources, out=str(tmp_path / "mean"))
    blocks = [{(name, n) for _, name, n in result["blocks"]} for result in results]
    stored = pools(1).run(f"{CASES}:stored", checkpoint=sources[-1])[0]
    weights = {name: n for name, n in stored.items() if not name.startswith("optimizer.")}
    reads = [read for result in results for read in result["blocks"]]
    assert len(reads) == len(sources) * sum(weights.values())  # each stored block once of each checkpoint
    assert all(len(mine) for mine in blocks)
    assert max(weights.values()) > 1  # split matrices are not put together
    assert pools(1).run(f"{CASES}:stored", checkpoint=results[0]["checkpoint"])[0] == weights
    assert results[0]["told"][-1] == (len(results[0]["blocks"]) // 3, sum(weights.values()))


@pytest.mark.parametrize("parts", [1, 3])
def test_tensors_are_read_in_any_blocks(pools: Pools, sharded: Path, parts: int) -> None:
    assert pools(1).run(f"{CASES}:reread", checkpoint=str(checkpoints(sharded)[0]), parts=parts) == [True]


def test_the_mean_is_evaluated_and_generates(pools: Pools, run: Path, streams: dict[str, str], tmp_path: Path) -> None:
    pools(1).run(f"{CASES}:averaged", sources=texts(checkpoints(run)), out=str(tmp_path / "mean"))
    held_out = streams["english-valid"]
    mean, *parts = (
        pools(1).run(f"{CASES}:loss", checkpoint=str(path), stream=held_out)[0]
        for path in (tmp_path / "mean", *checkpoints(run))
    )
    assert min(parts) - 0.1 < mean < max(parts)
    split = pools(2).run(f"{CASES}:loss", checkpoint=str(tmp_path / "mean"), stream=held_out)[0]
    assert split == pytest.approx(mean, rel=1e-5)
    said = command("generate", tmp_path / "mean", "--prompt", "the", "--max-tokens", "4", folder=tmp_path)
    assert said.status == 0
    assert said.out


def test_the_ledger_says_what_all_have_seen(pools: Pools, run: Path, streams: dict[str, str], tmp_path: Path) -> None:
    python = branch(pools, run, tmp_path / "python", streams["python"], "python")
    c = branch(pools, run, tmp_path / "c", streams["c"], "c")
    made = pools(1).run(
        f"{CASES}:averaged",
        sources=texts([checkpoints(run)[0], python, c]),
        out=str(tmp_path / "mean"),
        weights=[1, 1, 2],
    )[0]["checkpoint"]
    ledger = Ledger.read(Path(made))
    assert [(stage.name, stage.steps) for stage in ledger.stages] == [("first", 6), ("python", 2), ("c", 2)]
    ids = [Ledger.read(path).id for path in (checkpoints(run)[0], checkpoints(python)[-1], checkpoints(c)[-1])]
    assert ledger.derived == {"operation": "average", "of": ids, "weights": [0.25, 0.25, 0.5]}
    assert ledger.parent == ids[-1]
    assert ledger.id not in ids


def refused(pools: Pools, sources: list[Path], out: Path, weights: list[float] | None = None) -> tuple[str, str]:
    found: tuple[str, str] = pools(1).run(f"{CASES}:averaged", sources=texts(sources), out=str(out), weights=weights)[
        0
    ]["error"]
    assert not list(out.glob("checkpoints/step-*"))
    return found


@pytest.mark.parametrize(
    ("weights", "says"),
    [([1, 2], "3 checkpoints need as many weights"), ([1, -1, 3], "1, -1, 3"), ([0, 0, 0], "not all 0")],
)
def test_weights_that_do_not_fit_are_refused(
    pools: Pools, run: Path, tmp_path: Path, weights: list[float], says: str
) -> None:
    kind, text = refused(pools, checkpoints(run), tmp_path / "mean", weights)
    assert kind == "ConfigError"
    assert says in text


def test_another_model_is_refused(pools: Pools, run: Path, streams: dict[str, str], tmp_path: Path) -> None:
    config = run_mapping(
        tmp_path / "wide", {"english": streams["english"]}, 1, model={"ffn": 64, "rope": {"base": 500}}
    )
    other = Path(pools(1).run(f"{CASES}:make_run", config=config)[0])
    kind, text = refused(pools, [other, run], tmp_path / "mean")
    assert kind == "CheckpointError"
    assert "model.ffn (64 and 48), model.rope" in text


def test_a_damaged_checkpoint_is_named(pools: Pools, run: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(checkpoints(run)[0], tmp_path / checkpoints(run)[0].name)
    file = max(bad.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    kind, text = refused(pools, [bad, checkpoints(run)[1]], tmp_path / "mean")
    assert kind == "CheckpointError"
    assert file.name in text


def test_a_run_is_not_written_over(pools: Pools, run: Path) -> None:
    before = texts(checkpoints(run))
    (found,) = pools(1).run(f"{CASES}:averaged", sources=before, out=str(run))
    assert found["error"][0] == "ConfigError"
    assert texts(checkpoints(run)) == before


def test_the_last_of_a_run(run: Path) -> None:
    assert last_checkpoints(run, 2) == checkpoints(run)[1:]
    with pytest.raises(CheckpointError, match="holds 3 checkpoints, and 4"):
        last_checkpoints(run, 4)


@given(st.integers(1, 12), st.floats(0.01, 1))
def test_exponential_weights_are_those_of_a_moving_average(count: int, alpha: float) -> None:
    mean = [1.0] + [0.0] * (count - 1)
    for k in range(1, count):
        mean = [share * (1 - alpha) + (alpha if i == k else 0) for i, share in enumerate(mean)]
    assert exponential(count, alpha) == pytest.approx(mean, abs=1e-12)
    assert sum(uniform(count)) == pytest.approx(1)


def test_a_moving_average_has_a_share() -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        exponential(3, 1.5)


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    done = command("convert", "average", run, "--last", "2", "--weights", "ema:0.25", "--out", out, folder=tmp_path)
    assert done.status == 0, done.err
    derived: dict[str, Any] = json.loads((checkpoints(out)[0] / "ledger.json").read_text())["derived"]
    assert derived["weights"] == [0.75, 0.25]
    wrong = command("convert", "average", run, "--weights", "ema", "--out", tmp_path / "other", folder=tmp_path)
    assert wrong.status == 2
    assert "'ema' is not uniform, ema:ALPHA" in wrong.err


def test_ranks_share_the_command(sharded: Path, tmp_path: Path) -> None:
    ranks = launch_ranks("convert", "average", sharded, "--last", "3", "--out", "mean", folder=tmp_path, ranks=2)
    for rank in ranks:
        done = finish(rank, tmp_path)
        assert done.status == 0, done.err
    assert len(checkpoints(tmp_path / "mean")) == 1


def test_a_full_disk_is_named_and_leaves_nothing_half(run: Path, tmp_path: Path) -> None:
    full = command("convert", "average", run, "--last", "2", "--out", "mean", folder=tmp_path, largest_file=4000)
    assert full.status == 2
    assert "no space left (or a quota or file size limit reached) while writing" in full.err
    assert not checkpoints(tmp_path / "mean")
    again = command("convert", "average", run, "--last", "2", "--out", "mean", folder=tmp_path)
    assert again.status == 0, again.err
