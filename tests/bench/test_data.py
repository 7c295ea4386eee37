"""The data benchmark: the streams it makes, what both sides read of them, and what it reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megacpt.bench.compare import compare
from megacpt.bench.data import DataBench, alone, bench_data, case_name, same_cache
from megacpt.bench.loaders import OURS, PEER, PEER_IDS, Work, measure
from megacpt.bench.result import BenchResult, read_result
from megacpt.bench.streams import DENSE, make_stream
from megacpt.cli.bench import app
from megacpt.data.stream import TokenStream
from megacpt.errors import ConfigError, DataError, MegacptError
from tests.bench.loading import counted, die

SMALL = DataBench(
    tokens=(50_000, 80_000),
    seq_length=32,
    sequences=4,
    microbatch=2,
    document=100,
    repeats=2,
    seconds=0.01,
    peer_limit=50_000,
    models=(),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """A run of the benchmark on streams that take no time, in a folder that must be empty again."""
    folder = tmp_path_factory.mktemp("bench")
    heard: list[tuple[int, int]] = []
    found = bench_data(SMALL, folder, lambda done, of: heard.append((done, of)))
    assert heard == [(turn, 8) for turn in range(1, 9)]
    assert list(folder.iterdir()) == []
    return found


@pytest.mark.parametrize("tokens", [1000, 12_345])
def test_a_stream_is_whole_and_megatron_reads_the_same(tmp_path: Path, tokens: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stream = TokenStream.open(make_stream(tmp_path / "s", tokens, 100, seed=3))
    stream.indexed.check_positions()
    assert stream.tokens == tokens
    lengths = stream.indexed.document_lengths(stream.documents)
    assert lengths.sum() == tokens
    assert lengths.min() >= 50
    theirs = IndexedDataset(str(tmp_path / "s" / "tokens"))
    assert len(theirs) == stream.documents
    for number in (0, stream.documents - 1):
        assert theirs[number].tolist() == stream.document(number).tolist()
    again = TokenStream.open(make_stream(tmp_path / "again", tokens, 100, seed=3))
    other = TokenStream.open(make_stream(tmp_path / "other", tokens, 100, seed=4))
    assert again.read(0, tokens).tolist() == stream.read(0, tokens).tolist() != other.read(0, tokens).tolist()


def test_a_trillion_tokens_take_no_room_and_start_within_a_second(tmp_path: Path) -> None:
    folder = make_stream(tmp_path / "s", 10**12, 1000)
    assert (folder / "tokens.bin").stat().st_size == 2 * 10**12
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 30 << 20
    work, trials = Work((str(folder),), (1.0,), 4096, 8, 8, 10**6, ""), []
    for _ in range(3):  # the machine may be busy: the best of them says what the work is
        same_cache(work, 10**12)
        trials.append(alone(measure, OURS, work, 0.0))
    assert min(trial.start for trial in trials) < 1
    assert max(trial.memory for trial in trials) < 64 << 20


def test_both_sides_read_all_of_the_stream(tmp_path: Path) -> None:
    tokens, length, batch = 40_000, 64, 5
    stream = make_stream(tmp_path / "s", tokens, 90)
    samples = (tokens - 1) // length // batch * batch
    wanted = np.bincount(TokenStream.open(stream).read(0, tokens), minlength=256)
    for side in (OURS, PEER, PEER_IDS):
        found = alone(
            counted, side, Work((str(stream),), (1.0,), length, batch, batch, samples, str(tmp_path / "index"))
        )
        assert found["samples"] == samples
        assert found["shapes"] == {(batch, length)}
        missing = wanted - found["counts"]
        # A sample read twice would be another one missed: no id is read more often than it is there.
        assert missing.min() >= 0
        assert missing.sum() == tokens - samples * length


def test_both_sides_keep_the_shares_of_a_blend(tmp_path: Path) -> None:
    # The streams hold an id each, so that the ids tell where samples come from.
    folders = []
    for at in range(3):
        folder = make_stream(tmp_path / f"{at}", 20_000, 90)
        np.full(20_000, at, np.uint16).tofile(folder / "tokens.bin")
        folders.append(str(folder))
    work = Work(tuple(folders), (0.5, 0.3, 0.2), 64, 20, 5, 200, str(tmp_path / "index"))
    for side in (OURS, PEER, PEER_IDS):
        found = alone(counted, side, work)
        shares = np.asarray(found["counts"][:3]) / 64
        assert found["samples"] == 200
        assert np.abs(shares - [100, 60, 40]).max() <= 1


def test_a_result_has_every_figure(result: BenchResult) -> None:
    assert result.bench == "data"
    assert result.config["seq_length"] == 32
    assert "helpers_cpp" in result.config["megatron_helpers"]
    for streams in (1, 3):
        name = case_name(50_000, streams)
        for side in (OURS, PEER, PEER_IDS):
            for what in ("first start", "start again"):
                assert len(result.series[f"{name}: {side}: {what}"].blocks) == 2
            speed = result.series[f"{name}: {side}: microbatches"]
            assert (speed.work, speed.unit) == (32, "sample")
            assert all(blocks and min(blocks) > 0 for blocks in speed.blocks)
            assert result.figures[f"{name}: {side}: memory"] >= 0
        assert result.figures[f"{name}: {OURS}: index files"] == 0
        assert result.figures[f"{name}: {PEER}: index files"] > 1000
        for what in ("first start", "start again", "microbatches"):
            ratio = result.figures[f"{name}: {what}: {OURS} / {PEER}"]
            assert ratio.low <= ratio.value <= ratio.high


def test_the_peer_is_left_out_above_its_limit(result: BenchResult) -> None:
    name = case_name(80_000, 1)
    assert f"{name}: {OURS}: microbatches" in result.series
    assert not [key for key in (*result.series, *result.figures) if key.startswith(name) and PEER in key]


def test_the_loader_is_at_least_twenty_times_faster_than_the_model_needs(tmp_path: Path) -> None:
    found = bench_data(replace(SMALL, tokens=(50_000,), peer_limit=0, models=("tiny",)), tmp_path)
    ratio = found.figures["tiny: training a step / loading a step"]
    assert ratio.low > 20
    assert found.series["tiny: training a step"].work == 8 * 256


@pytest.mark.parametrize(
    ("bench", "advice"),
    [
        (DataBench(tokens=(10_000,)), "or fewer and shorter samples"),
        (DataBench(tokens=(10**6, 10_000), seq_length=8, document=9000), "take 45,001 or more"),
        (DataBench(microbatch=6), "must be a multiple of --microbatch 6"),
        (DataBench(repeats=1), "two --repeats"),
        (DataBench(tokens=()), "at least one"),
        (DataBench(models=("tinny",)), "did you mean 'tiny'"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tmp_path: Path, bench: DataBench, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        bench_data(bench, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_obstacles_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="use shorter documents"):
        make_stream(tmp_path / "s", 10, 100)
    with pytest.raises(MegacptError, match="ended unexpectedly"):
        alone(die)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MegacptError, match=r"1,000 tokens cannot be written to .*: No space left"):
        make_stream(tmp_path / "t", 1000, 100)


def test_sizes_are_called_as_people_write_them() -> None:
    assert [case_name(n, 1) for n in (50_000, 10**7, 25 * 10**8)] == [
        "50000 tokens, 1 stream", "10M tokens, 1 stream", "2.5B tokens, 1 stream",
    ]  # fmt: skip
    assert case_name(10**12, 3) == "1T tokens, 3 streams"
    assert DENSE < 10**9


def test_the_command_prints_a_table_and_writes_what_compare_reads(tmp_path: Path) -> None:
    small = ["--tokens", "50k", "--seq-length", "32", "--microbatch", "2", "--document", "100", "--repeats", "2"]
    file = tmp_path / "a.json"
    arguments = ["data", *small, "--model", "tiny", "--dir", str(tmp_path), "--json", str(file)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"})
    assert shown.exit_code == 0, shown.output
    for word in (
        "50000 tokens, 1 stream",
        "50000 tokens, 3 streams",
        OURS,
        PEER_IDS,
        "first start",
        "samples/s",
        "tiny trains",
    ):
        assert word in shown.output
    found = read_result(file)
    compared = compare(found, found)
    assert [change.name for change in compared.changes] == list(found.series)
    assert compared.differences == []
    wrong = CliRunner().invoke(app, ["data", "--tokens", "many"])
    assert wrong.exit_code == 2
    assert "this is not a number of tokens" in wrong.output
