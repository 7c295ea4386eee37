from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import check, check_layout, check_streams
from megacpt.errors import ConfigError, LayoutError
from tests.config.helpers import make_run

# The run has 4 layers, 8 heads, 4 key and value heads, ffn 352 = 2^5 * 11, 32 sequences of 256 tokens, microbatch 4.


@pytest.mark.parametrize(
    ("overrides", "ranks", "vocab", "expected"),
    [
        (
            ["parallel.tensor=3"],
            None,
            None,
            "parallel.tensor: 3 does not divide model.heads (8), neither divides model.kv_heads (4) nor is a multiple "
            "of it, does not divide model.ffn (352): take 2 or 4",
        ),
        (["parallel.tensor=16"], None, None, "parallel.tensor: 16 does not divide model.heads (8): take 8"),
        (
            ["parallel.tensor=8", "model.ffn=300"],
            None,
            None,
            "parallel.tensor: 8 does not divide model.ffn (300): take 4",
        ),
        (
            ["parallel.tensor=4", "model.vocab_multiple=2"],
            None,
            257,
            "parallel.tensor: 4 does not divide the padded vocabulary (258): take 2",
        ),
        (
            ["parallel.tensor=6", "model.heads=12", "model.hidden=192", "model.ffn=96"],
            None,
            None,
            "parallel.tensor: 6 neither divides model.kv_heads (4) nor is a multiple of it: take 4 or 12",
        ),
        (
            ["parallel.tensor=8", "model.qk_norm=all_heads"],
            None,
            None,
            "parallel.tensor: 8 does not divide model.kv_heads (4), which model.qk_norm: all_heads needs: take 4",
        ),
        (
            ["parallel.tensor=8", "parallel.sequence=true", "parallel.context=2", "batch.seq_length=24"],
            None,
            None,
            "parallel.tensor: 8 does not divide the 12 tokens of a sequence on each rank: take 4",
        ),
        (
            ["parallel.pipeline=3"],
            None,
            None,
            "parallel.pipeline: 3 stages do not divide model.layers (4): take 2 or 4",
        ),
        (["parallel.pipeline=8"], None, None, "parallel.pipeline: 8 stages do not divide model.layers (4): take 4"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
            None,
            None,
            "parallel.virtual_pipeline: 3 groups on each of 2 stages do not divide model.layers (4): take 2",
        ),
        (
            ["parallel.pipeline=3", "parallel.virtual_pipeline=2"],
            None,
            None,
            "parallel.pipeline: 3 stages of 2 groups each do not divide model.layers (4): take 2",
        ),
        (
            ["parallel.virtual_pipeline=2"],
            None,
            None,
            "parallel.virtual_pipeline: 2 needs parallel.pipeline above 1: take 1 here, or more pipeline stages",
        ),
        (
            ["batch.seq_length=4096"],
            None,
            None,
            "batch.seq_length: 4096 is longer than model.max_seq_length: take at most 2048, or raise that key",
        ),
        (
            ["parallel.context=3"],
            None,
            None,
            "parallel.context: each of 3 ranks takes two equal chunks of a sequence, but 6 does not divide "
            "batch.seq_length (256): take 2 or 4, or a batch.seq_length of 252 or 258",
        ),
        (
            ["parallel.context=2", "batch.seq_length=255"],
            None,
            None,
            "parallel.context: each of 2 ranks takes two equal chunks of a sequence, but 4 does not divide "
            "batch.seq_length (255): take 1, or a batch.seq_length of 252 or 256",
        ),
        (
            ["parallel.sequence=true"],
            None,
            None,
            "parallel.sequence: true splits the sequence among tensor-parallel ranks, but parallel.tensor is 1: take "
            "false, or parallel.tensor above 1",
        ),
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            6,
            None,
            "parallel: 6 ranks are not a multiple of tensor * pipeline * context = 2 * 2 * 1 = 4: take 4 or 8 ranks, "
            "or a smaller layout",
        ),
        (
            ["parallel.tensor=4"],
            2,
            None,
            "parallel: 2 ranks are not a multiple of tensor * pipeline * context = 4 * 1 * 1 = 4: take 4 ranks, or a "
            "smaller layout",
        ),
        (
            ["batch.microbatch=5"],
            None,
            None,
            "batch.microbatch: 5 does not divide the 32 sequences of each data-parallel rank: take 4 or 8",
        ),
        (
            ["batch.microbatch=16"],
            4,
            None,
            "batch.microbatch: 16 does not divide the 8 sequences of each data-parallel rank: take 8",
        ),
        (
            [],
            3,
            None,
            "batch.sequences: 32 is not a multiple of microbatch * data-parallel size = 4 * 3: take 24 or 36",
        ),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.sequences=12"],
            2,
            None,
            "batch.sequences: 12 gives 3 microbatches to a rank; with virtual_pipeline above 1 they must be a multiple "
            "of parallel.pipeline (2): take 8 or 16 sequences",
        ),
        (
            ["model.vocab_size=200"],
            None,
            257,
            "model.vocab_size: 200 is less than the 257 entries of the tokenizer: take null or at least 257",
        ),
    ],
)
def test_layouts_that_do_not_fit(overrides: list[str], ranks: int | None, vocab: int | None, expected: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_layout(make_run(*overrides), ranks, vocab)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ([], 1),
        ([], 8),
        (["parallel.tensor=8"], 8),
        (["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.context=2"], 16),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 8),
        (["parallel.pipeline=4"], 4),
        (["parallel.context=128", "batch.sequences=4"], 128),
        (["model.vocab_size=257", "parallel.tensor=4"], None),
        (["batch.seq_length=2048"], 1),
    ],
)
def test_layouts_that_fit(overrides: list[str], ranks: int | None) -> None:
    check_layout(make_run(*overrides), ranks, 257)


def test_everything_is_listed() -> None:
    with pytest.raises(LayoutError) as caught:
        check_layout(make_run("parallel.tensor=3", "parallel.pipeline=3", "parallel.context=3"), 4)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.context",
        "parallel",
    ]


@given(
    st.sampled_from(["tensor", "pipeline", "context"]),
    st.integers(2, 40),
    st.sampled_from([96, 128, 256, 384]),
    st.sampled_from([4, 6, 12]),
)
def test_what_is_proposed_fits(key: str, size: int, length: int, layers: int) -> None:
    overrides = [f"batch.seq_length={length}", f"model.layers={layers}", "model.heads=16", "model.kv_heads=4"]
    try:
        check_layout(make_run(*overrides, f"parallel.{key}={size}"), vocab=257)
    except LayoutError as error:
        choices = str(error).partition(": take ")[2].partition(",")[0].split(" or ")
        assert choices
        for choice in choices:
            check_layout(make_run(*overrides, f"parallel.{key}={choice}"), vocab=257)


def _stream(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "stream.json").write_text(json.dumps({}))


def test_missing_streams(tmp_path: Path) -> None:
    _stream(tmp_path / "english")
    _stream(tmp_path / "more" / "python")
    (tmp_path / "empty").mkdir()
    mixture = {"a": "english", "b": "englsh", "c": "empty", "d": "more", "e": "qqq"}
    named = ", ".join(f"{name}: {tmp_path / folder}" for name, folder in mixture.items())
    run = make_run(f"stage.mixture={{{named}}}", f"evaluate.streams={{x: {tmp_path / 'nowhere' / 'english'}}}")
    with pytest.raises(ConfigError) as caught:
        check_streams(run)
    assert str(caught.value).splitlines() == [
        f"stage.mixture.b.path: {tmp_path}/englsh does not exist; did you mean 'english'?",
        f"stage.mixture.c.path: {tmp_path}/empty is not a token stream: it holds no stream.json",
        f"stage.mixture.d.path: {tmp_path}/more is not a token stream: it holds no stream.json; "
        "it holds the streams python",
        f"stage.mixture.e.path: {tmp_path}/qqq does not exist; make it with `megacpt data prepare TEXT... --tokenizer "
        f"bytes --out {tmp_path}/qqq`",
        f"evaluate.streams.x: {tmp_path}/nowhere/english does not exist; make it with `megacpt data prepare TEXT... "
        f"--tokenizer bytes --out {tmp_path}/nowhere/english`",
    ]


def test_streams_that_are_there(tmp_path: Path) -> None:
    _stream(tmp_path / "english")
    run = make_run(f"stage.mixture.english={tmp_path / 'english'}")
    check_streams(run)
    check(run, world_size=2, vocab=257)


def test_layout_and_streams_together() -> None:
    with pytest.raises(ConfigError) as caught:
        check(make_run("parallel.pipeline=3"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "parallel.pipeline",
        "stage.mixture.english.path",
    ]
