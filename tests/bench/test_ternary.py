"""``megacpt bench ternary``: what it measures, and llama.cpp beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megacpt.bench.result import Interval, read_result
from tests.cli.command import megacpt
from tests.pool import Pools

CASES = "tests.bench.cases"
# What the worker uses of llama-cpp-python: each model says its ids backwards from the number of its tokens.
STAND_IN = """
import ctypes

llama_token = ctypes.c_int32
logits = (ctypes.c_float * 64)()
read = []


class Settings:
    pass


def llama_backend_init(): ...
def llama_model_default_params(): ...
def llama_model_load_from_file(path, _): return open(path, "rb").read(4) == b"GGUF"
def llama_context_default_params(): return Settings()
def llama_init_from_model(model, settings): return (settings.n_ctx, settings.n_threads, settings.n_threads_batch)
def llama_model_get_vocab(model): assert model
def llama_vocab_n_tokens(_): return 64
def llama_get_memory(_): return read
def llama_memory_clear(memory, _): memory.clear()
def llama_batch_get_one(ids, count): return list(ids)[:count]
def llama_get_logits_ith(_, place): return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))


def llama_decode(context, batch):
    assert context == (20, 1, 1)
    read.extend(batch)
    ctypes.memset(logits, 0, ctypes.sizeof(logits))
    logits[63 - len(read)] = 1.0
    return 0
"""


def test_the_command_prints_and_writes_all_figures(tmp_path: Path) -> None:
    done = megacpt(
        "bench", "ternary", "--quick", "--blocks", "2", "--threads", "1", "--json", "t.json", folder=tmp_path
    )
    assert done.status == 0, done.err
    for text in ("2048 x 2048", "dense float32, torch", "decode: packed, int8 x dense float32: ", "training, ternary"):
        assert text in done.out
    result = read_result(tmp_path / "t.json")
    for name in ("layer 2048 x 2048, 16 tokens: packed, float x torch float32", "training, ternary / float"):
        found = result.figures[name]
        assert isinstance(found, Interval)
        assert 0 < found.low <= found.value <= found.high
    assert result.series["decode: packed, int8"].work == result.config["count"]
    assert {len(series.blocks) for series in result.series.values()} == {2}


def test_llama_cpp_runs_the_same_weights_in_its_own_process(tmp_path: Path, pools: Pools) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "llama_cpp.py").write_text(STAND_IN)
    (found,) = pools(1).run(f"{CASES}:beside_llama_cpp", python=sys.executable, path=str(tmp_path), folder=tmp_path)
    # After 5 tokens of prompt the likeliest is 58, after each further one the id below.
    assert found == [58, 57, 56, 55]


@pytest.mark.parametrize(("python", "words"), [("no-such-python", "No such file"), (sys.executable, "llama_cpp")])
def test_an_interpreter_without_llama_cpp_is_named(tmp_path: Path, pools: Pools, python: str, words: str) -> None:
    pytest.importorskip("gguf")
    (found,) = pools(1).run(f"{CASES}:beside_llama_cpp", python=python, path="", folder=tmp_path)
    assert isinstance(found, str)
    assert f"--llama-cpp {python}" in found
    assert words in found
    assert "pip install llama-cpp-python" in found or "give an interpreter" in found
