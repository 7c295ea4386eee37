"""What a user may get wrong: each mistake ends with status 2 and a message that names it, and loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megacpt.checkpoint.store import checkpoints
from megacpt.data.stream import TokenStream
from tests.cli.command import Result, megacpt
from tests.small import make_stream, make_streams, run_mapping

Files = dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with streams in ``data`` and a complete run in ``runs/english``."""
    folder = tmp_path_factory.mktemp("place")
    make_streams(folder / "data")
    (folder / "run.yaml").write_text(_yaml())
    done = megacpt("train", "run.yaml", folder=folder)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(place, tmp_path / "here"))


def _yaml(run: str = "runs/english", stream: str = "data/english", steps: int = 2, **changes: Any) -> str:
    text: str = yaml.safe_dump(run_mapping(run, {"english": stream}, steps, **changes))
    return text


def _stage(**keys: Any) -> str:
    text: str = yaml.safe_dump(
        {"stage": {"name": "python", "tokens": 256, "mixture": {"python": "data/python"}, **keys}}
    )
    return text


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but what the test itself captured."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if name not in (".out", ".err")}


def _refused(folder: Path, *arguments: str | Path, says: list[str], largest_file: int | None = None) -> Result:
    """Run a command that has to end with one clear message."""
    found = megacpt(*arguments, folder=folder, largest_file=largest_file)
    assert found.status == 2, found.err
    assert "Traceback" not in found.err
    assert found.err.count("error:") == 1
    message = found.err[found.err.index("error:") :]
    for words in says:
        assert words in message
    return found


# Preparing text.


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_TEXT: dict[str, tuple[str, bytes, list[str]]] = {
    "an empty file": ("books.txt", b"", ["books.txt", "empty"]),
    "invalid UTF-8 in text": ("books.txt", b"fine \xff\xfe not fine", ["books.txt", "UTF-8"]),
    "invalid UTF-8 in a line": ("web.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', ["web.jsonl", "line 2", "UTF-8"]),
    "a line without the field": ("web.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["web.jsonl", "line 2", "'text'"]),
    "a line that is no JSON": ("web.jsonl", b'{"text": "a"}\n{"text": \n', ["web.jsonl", "line 2"]),
    "a field that is no text": ("web.jsonl", b'{"text": 7}\n', ["web.jsonl", "line 1", "text"]),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text(tmp_path: Path, name: str) -> None:
    file, content, says = BAD_TEXT[name]
    _write(tmp_path / file, content)
    arguments = ("data", "prepare", file, "--tokenizer", "bytes", "--out", "stream", "--workers", "1")
    _refused(tmp_path, *arguments, says=says)
    assert not (tmp_path / "stream").exists()
    assert (tmp_path / file).read_bytes() == content
    # Mended, the same command makes the stream.
    good = b'{"text": "good"}\n' if file.endswith("jsonl") else b"good"
    _write(tmp_path / file, good)
    assert megacpt(*arguments, folder=tmp_path).status == 0
    assert TokenStream.open(tmp_path / "stream", verify="full").tokens == 5


def test_a_missing_input_or_tokenizer(tmp_path: Path) -> None:
    _write(tmp_path / "books.txt", b"text")
    prepare = ("data", "prepare", "--out", "stream", "--workers", "1")
    _refused(tmp_path, *prepare, "book.txt", "--tokenizer", "bytes", says=["book.txt"])
    _refused(tmp_path, *prepare, "books.txt", "--tokenizer", "nowhere", says=["nowhere"])
    _refused(tmp_path, *prepare, "books.txt", "--tokenizer", "bytes", "--holdout", "all", says=["--holdout all"])


def test_a_full_disk_while_text_is_prepared(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {i} of many"}) + "\n" for i in range(3000))
    (tmp_path / "web.jsonl").write_text(lines)
    arguments = ("data", "prepare", "web.jsonl", "--tokenizer", "bytes", "--out", "stream", "--workers", "1")
    _refused(tmp_path, *arguments, says=["stream", "again"], largest_file=20_000)
    assert not (tmp_path / "stream").exists()
    assert megacpt(*arguments, folder=tmp_path).status == 0
    assert megacpt(*(a.replace("stream", "other") for a in arguments), folder=tmp_path).status == 0
    one, other = (TokenStream.open(tmp_path / name, verify="full").meta.content_hash for name in ("stream", "other"))
    assert one == other


# The configuration of a run.

BAD_RUNS: dict[str, tuple[list[str], list[str]]] = {
    "a typo in a key": (["optim.peek_lr=1e-3"], ["optim.peek_lr", "did you mean", "peak_lr"]),
    "a typo in a value": (["precision=float23"], ["precision", "float32"]),
    "an impossible value": (["batch.sequences=0"], ["batch.sequences"]),
    "a quantity without its unit": (["schedule.warmup=5"], ["schedule.warmup", "unit"]),
    "a layout that does not divide": (["parallel.tensor=3"], ["parallel.tensor", "3", "model.heads (2)"]),
    "more ranks than there are": (["parallel.tensor=2"], ["parallel", "1 ranks"]),
    "a batch that does not divide": (["batch.microbatch=3"], ["batch.microbatch", "3"]),
    "a missing stream": (["stage.mixture.english.path=data/engish"], ["stage.mixture.english.path", "'english'"]),
    "a folder that is no stream": (
        ["stage.mixture.english.path=data"],
        ["stage.mixture.english.path", "no stream.json"],
    ),
    "a missing tokenizer": (["tokenizer=nowhere"], ["nowhere"]),
    "replay of nothing": (["stage.replay.share=10%"], ["stage.replay.share", "nothing to replay"]),
    "samples longer than the stream": (
        ["batch.seq_length=8192", "model.max_seq_length=8192"],
        ["data/english", "8,193", "shorter seq_length"],
    ),
    "an override without a value": (["optim.peak_lr"], ["optim.peak_lr", "KEY=VALUE"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run(here: Path, name: str) -> None:
    overrides, says = BAD_RUNS[name]
    before = _contents(here)
    _refused(here, "train", "run.yaml", "run=runs/new", *overrides, says=says)
    assert _contents(here) == before
    assert not (here / "runs" / "new").exists()


def test_a_run_file_that_is_none(here: Path) -> None:
    _refused(here, "train", "run.yml", says=["run.yml"])
    (here / "bad.yaml").write_text("run: [unclosed\n")
    _refused(here, "train", "bad.yaml", says=["bad.yaml"])
    (here / "typo.yaml").write_text(_yaml().replace("microbatch:", "microbtach:"))
    _refused(here, "train", "typo.yaml", says=["typo.yaml", "batch.microbtach", "microbatch"])
    (here / "empty.yaml").write_text("")
    _refused(here, "train", "empty.yaml", says=["empty.yaml"])


def test_another_stream_in_place_of_the_one_that_was_trained_on(here: Path) -> None:
    shutil.rmtree(here / "data" / "english")
    make_stream(here / "data", "english", seed=1)
    before = _contents(here)
    _refused(here, "train", "run.yaml", says=["stage.mixture.english: the stream", "data/english", "content hash"])
    assert _contents(here) == before


def test_a_stream_with_another_tokenizer(here: Path) -> None:
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 50)
    train = ("data", "train-tokenizer", "text.txt", "--vocab-size", "300", "--out", "pieces")
    assert megacpt(*train, folder=here).status == 0
    prepare = ("data", "prepare", "text.txt", "--tokenizer", "pieces", "--out", "data/pieces", "--workers", "1")
    assert megacpt(*prepare, folder=here).status == 0
    override = "stage.mixture.english.path=data/pieces"
    both = ["data/pieces", "here/pieces", "bytes", "prepare the stream again"]
    _refused(here, "train", "run.yaml", "run=runs/new", override, says=both)
    assert not (here / "runs" / "new").exists()
    _refused(here, "eval", "runs/english", "--stream", "data/pieces", says=both)


@pytest.mark.parametrize("file", ["english.bin", "english.idx"])
def test_a_truncated_token_file(here: Path, file: str) -> None:
    (path,) = (here / "data" / "english").rglob(file)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    before = _contents(here)
    for arguments in (("train", "run.yaml", "run=runs/new"), ("train", "run.yaml")):
        _refused(here, *arguments, says=[file])
    _refused(here, "data", "inspect", "data/english", says=[file])
    assert _contents(here) == before
    path.write_bytes(content)
    assert megacpt("train", "run.yaml", "run=runs/new", folder=here).status == 0


# Saving and resuming.


def test_a_full_disk_while_a_checkpoint_is_saved(here: Path) -> None:
    (run,) = (here / "runs").iterdir()
    before = {name: content for name, content in _contents(run).items() if name.startswith("checkpoints")}
    longer = f"stage.tokens={4 * 128}"
    _refused(here, "train", "run.yaml", longer, largest_file=60_000, says=["no space left", "step-00000004", "again"])
    after = _contents(run)
    assert {name: after[name] for name in before} == before
    assert [path.name for path in checkpoints(run)] == ["step-00000002"]
    assert megacpt("train", "run.yaml", longer, folder=here).status == 0
    whole = megacpt("train", "run.yaml", longer, "run=runs/whole", folder=here)
    assert whole.status == 0
    one, other = (_tensors(here / "runs" / name / "checkpoints" / "step-00000004") for name in ("english", "whole"))
    assert one == other


def _tensors(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def test_a_full_disk_before_the_first_step(here: Path) -> None:
    found = _refused(
        here, "train", "run.yaml", "run=runs/new", largest_file=100, says=["run: runs/new cannot be written"]
    )
    assert "limit" in found.err
    assert megacpt("train", "run.yaml", "run=runs/new", folder=here).status == 0


def test_a_run_folder_that_cannot_be(here: Path) -> None:
    _refused(here, "train", "run.yaml", "run=run.yaml/below", says=["run: run.yaml/below cannot be written"])


def test_settings_that_a_resume_cannot_change(here: Path) -> None:
    before = _contents(here)
    arguments = ("train", "run.yaml", "optim.peak_lr=5e-3", "batch.sequences=16")
    changed = ["optim.peak_lr: 0.01 -> 0.005", "batch.sequences: 8 -> 16"]
    _refused(here, *arguments, says=["runs/english", *changed, "megacpt continue runs/english"])
    assert _contents(here) == before


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


Break = Callable[[Path], Any]
BROKEN: dict[str, tuple[str, Break]] = {
    "tensors": ("__0_0.distcp", _flip),
    "index": (".metadata", Path.unlink),
    "manifest": ("manifest.json", lambda path: path.write_text("{")),
    "ledger": ("ledger.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "configuration": ("run.yaml", lambda path: path.write_text("run: [")),
}


@pytest.mark.parametrize("part", BROKEN)
def test_a_damaged_checkpoint(here: Path, part: str) -> None:
    """Whatever is damaged, whichever command meets it: the file is named, and nothing is written."""
    name, spoil = BROKEN[part]
    checkpoint = here / "runs" / "english" / "checkpoints" / "step-00000002"
    spoil(checkpoint / name)
    (here / "stage.yaml").write_text(_stage())
    before = _contents(here)
    path = f"step-00000002/{name}"
    _refused(here, "train", "run.yaml", says=["every checkpoint in runs/english/checkpoints is damaged", path])
    _refused(here, "eval", checkpoint, "--stream", "data/english-valid", says=[name])
    assert _contents(here) == before
    _refused(here, "continue", checkpoint, "stage.yaml", "--run", "runs/new", says=[name])
    _refused(here, "anneal", "runs/english", "--tokens", "1 steps", "--run", "runs/release", says=[name])
    after = _contents(here)
    assert {file: after[file] for file in before} == before
    assert not [file for file in after if file not in before and "checkpoints" in file]


# Boundaries.


def test_places_that_hold_no_checkpoint(here: Path) -> None:
    (here / "stage.yaml").write_text(_stage())
    for arguments in (
        ("continue", "runs/nothing", "stage.yaml", "--run", "runs/new"),
        ("anneal", "runs/nothing", "--run", "runs/new"),
        ("eval", "runs/nothing", "--stream", "data/english-valid"),
        ("generate", "runs/nothing", "--prompt", "x"),
    ):
        _refused(here, *arguments, says=["runs/nothing does not exist; give a run folder"])
    _refused(
        here, "eval", "data", "--stream", "data/english-valid", says=["data holds no checkpoint: give a run folder"]
    )
    _refused(here, "lineage", "show", "data", says=["no run in data: a run folder holds start.json"])


BAD_STAGES: dict[str, tuple[str, list[str]]] = {
    "another model": (_stage() + "model: {hidden: 64}\n", ["model.hidden", "a stage cannot change this"]),
    "no stage": ("seed: 3\n", ["stage.yaml", "stage"]),
    "replay of its own stream": (
        yaml.safe_dump(
            {
                "stage": {
                    "name": "more",
                    "tokens": 256,
                    "mixture": {"english": "data/english"},
                    "replay": {"share": "25%"},
                }
            }
        ),
        ["stage.replay.share", "the mixture holds every earlier stream already"],
    ),
    "all replay": (_stage(replay={"share": "100%"}), ["stage.replay.share"]),
    "a missing stream": (_stage(mixture={"python": "data/pyton"}), ["stage.mixture.python.path", "'python'"]),
    "an anneal schedule on a trunk": (_stage() + "schedule: {kind: anneal}\n", ["schedule.kind", "release branch"]),
}


@pytest.mark.parametrize("name", BAD_STAGES)
def test_a_bad_stage(here: Path, name: str) -> None:
    text, says = BAD_STAGES[name]
    (here / "stage.yaml").write_text(text)
    before = _contents(here)
    _refused(here, "continue", "runs/english", "stage.yaml", "--run", "runs/new", says=says)
    assert _contents(here) == before


def test_a_stage_needs_a_folder_of_its_own(here: Path) -> None:
    (here / "stage.yaml").write_text(_stage())
    _refused(here, "continue", "runs/english", "stage.yaml", says=["run"])
    _refused(
        here, "continue", "runs/english", "stage.yaml", "--run", "runs/english", says=["the folder of the run that"]
    )


@pytest.mark.parametrize("tokens", ["half", "12", "120%"])
def test_a_length_of_a_branch_that_is_none(here: Path, tokens: str) -> None:
    _refused(here, "anneal", "runs/english", "--tokens", tokens, "--run", "runs/release", says=["--tokens", tokens])
    assert not (here / "runs" / "release").exists()


def test_continuing_an_annealed_branch_with_a_jump(here: Path) -> None:
    anneal = ("anneal", "runs/english", "--tokens", "100%", "--run", "runs/release")
    assert megacpt(*anneal, folder=here).status == 0
    (here / "stage.yaml").write_text(_stage() + "schedule: {kind: constant, warmup: 0%}\n")
    says = ["runs/release", "is annealed", "Continue the trunk instead", "runs/english", "rewarmed_cosine"]
    _refused(here, "continue", "runs/release", "stage.yaml", "--run", "runs/new", says=says)
    assert not (here / "runs" / "new").exists()


def test_an_evaluation_of_nothing(here: Path) -> None:
    _refused(here, "eval", "runs/english", "--stream", "data/nothing", says=["data/nothing"])
    _refused(
        here, "eval", "runs/english", "--stream", "data/english-valid", "--tokens", "some", says=["--tokens", "some"]
    )
    arguments = ("eval", "runs/english", "--stream", "data/english-valid", "parallel.tensor=3")
    _refused(here, *arguments, says=["parallel.tensor", "model.heads (2)"])
