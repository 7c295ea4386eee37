"""A GGUF file holds the model as llama.cpp computes it; where llama.cpp is installed, it says the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacpt.data.prepare import prepare
from megacpt.data.train_tokenizer import train_tokenizer
from tests.cli.command import megacpt as command
from tests.convert.exports import TERNARY, ask, export, refused, trained
from tests.pool import Pools
from tests.small import WORDS, make_stream

gguf = pytest.importorskip("gguf", reason="the package gguf (extra gguf) writes and reads the files")
# Rows of 256 and 512 weights are whole blocks.
WIDE: dict[str, Any] = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}
SENTENCE = "the old ship went out in the night and a sailor sang of wind, fog and home. "
PROMPTS = [list(text) for text in (b"the old ship", b"in the night", b"fog and home. the")]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_stream(tmp_path_factory.mktemp("streams"), "english"))


@pytest.fixture(scope="module")
def ternary(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on one sentence until it knows it, so that roundings of another program decide no token."""
    folder = tmp_path_factory.mktemp("ternary")
    (folder / "texts.jsonl").write_text(json.dumps({"text": SENTENCE * 30}) + "\n")
    prepare([folder / "texts.jsonl"], "bytes", folder / "stream", workers=1, progress=False)
    model = {**WIDE, "max_seq_length": 128, "quantise": TERNARY}
    batch = {"sequences": 8, "seq_length": 96, "microbatch": 8}
    steps: dict[str, Any] = {"stage": {"tokens": 60 * 8 * 96}, "checkpoint": {"every": "60 steps"}}
    return trained(
        pools, folder / "run", str(folder / "stream"), model=model, batch=batch, optim={"peak_lr": 4e-3}, **steps
    )


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def field(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


def dense(tensor: Any) -> np.ndarray:
    found: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return found


def pairs_as_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head back in our order: llama.cpp has dim j beside dim j + d/2."""
    d = len(matrix) // heads
    order = [h * d + 2 * (j % (d // 2)) + j // (d // 2) for h in range(heads) for j in range(d)]
    found: np.ndarray = matrix[order]
    return found


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "f32", "f16"])
def test_a_file_holds_the_weights_of_the_model(pools: Pools, ternary: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.gguf"
    export(pools, "to_gguf", ternary, file, kind=kind, plain="f32")
    due = ask(pools, "plain_weights", checkpoint=str(ternary))
    found = tensors(file)
    assert len(found) == len(due)
    for layer in range(2):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        for name, of in (("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj")):
            tensor = found[f"{theirs}.{name}.weight"]
            assert tensor.tensor_type.name == kind.upper()
            np.testing.assert_array_equal(dense(tensor), due[f"{ours}.{of}.weight"])
        np.testing.assert_array_equal(dense(found[f"{theirs}.ffn_down.weight"]), due[f"{ours}.mlp.down_proj.weight"])
        for name, heads in (("q", 4), ("k", 2)):
            rows = pairs_as_halves(dense(found[f"{theirs}.attn_{name}.weight"]), heads)
            np.testing.assert_array_equal(rows, due[f"{ours}.self_attn.{name}_proj.weight"])
        np.testing.assert_array_equal(dense(found[f"{theirs}.attn_v.weight"]), due[f"{ours}.self_attn.v_proj.weight"])
    np.testing.assert_array_equal(dense(found["output.weight"]), due["lm_head.weight"][:257])
    np.testing.assert_array_equal(dense(found["token_embd.weight"]), due["model.embed_tokens.weight"][:257])
    assert field(file, "general.architecture") == "llama"
    assert field(file, "llama.attention.head_count_kv") == 2
    assert field(file, "llama.rope.freq_base") == 10000.0


def test_the_command_says_what_becomes_of_narrow_rows(pools: Pools, stream: str, tmp_path: Path) -> None:
    checkpoint = trained(pools, tmp_path / "run", stream, model={"hidden": 256, "quantise": {"grid": "ternary"}})
    done = command("convert", "to-gguf", checkpoint, "--out", "model.gguf", folder=tmp_path)
    assert done.status == 0, done.err
    # ffn is 48: the second matrices of the MLPs have rows of no whole block.
    assert "2 matrices are written as F16, blk.0.ffn_down.weight (48 columns) among them" in done.err
    assert "scales of quantised matrices are not whole numbers of float16" in done.err
    found = tensors(tmp_path / "model.gguf")
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "TQ2_0"
    assert found["token_embd.weight"].tensor_type.name == "F16"
    due = ask(pools, "plain_weights", checkpoint=str(checkpoint))
    np.testing.assert_allclose(
        dense(found["blk.0.ffn_up.weight"]), due["model.layers.0.mlp.up_proj.weight"], rtol=2**-11
    )


def test_scales_of_narrow_groups_fit_no_block(pools: Pools, stream: str, tmp_path: Path) -> None:
    grid = {"grid": "ternary", "scale": {"scope": "group", "group": 128, "format": "float16"}}
    checkpoint = trained(pools, tmp_path / "run", stream, model={**WIDE, "quantise": grid})
    export(pools, "to_gguf", checkpoint, tmp_path / "model.gguf")
    assert {tensor.tensor_type.name for tensor in tensors(tmp_path / "model.gguf").values()} == {"F16", "F32"}


def test_a_scaling_that_is_not_written_is_refused(pools: Pools, stream: str, tmp_path: Path) -> None:
    rope = {"scaling": {"kind": "yarn", "factor": 4, "original_length": 32}}
    checkpoint = trained(pools, tmp_path / "run", stream, model={"rope": rope})
    found = refused(pools, "to_gguf", checkpoint, tmp_path / "model.gguf")
    assert found is not None
    assert "model.rope.scaling.kind: yarn is not written to GGUF files" in found[1]


def test_a_float_model_has_no_ternary_form(pools: Pools, stream: str, tmp_path: Path) -> None:
    checkpoint = trained(pools, tmp_path / "run", stream, model={"tied_embeddings": True, "bias": True})
    found = refused(pools, "to_gguf", checkpoint, tmp_path / "model.gguf", kind="tq1_0")
    assert found is not None
    assert "--type tq1_0 is for ternary matrices" in found[1]
    export(pools, "to_gguf", checkpoint, tmp_path / "model.gguf")
    stored = tensors(tmp_path / "model.gguf")
    assert "output.weight" not in stored
    assert stored["blk.1.ffn_up.bias"].tensor_type.name == "F32"
    assert stored["blk.1.ffn_up.weight"].tensor_type.name == "F16"


def test_frequencies_of_llama_3_go_along(pools: Pools, stream: str, tmp_path: Path) -> None:
    rope = {"base": 1000.0, "scaling": {"kind": "llama3", "factor": 8, "original_length": 64}}
    checkpoint = trained(pools, tmp_path / "run", stream, model={"rope": rope})
    export(pools, "to_gguf", checkpoint, tmp_path / "model.gguf")
    factors = tensors(tmp_path / "model.gguf")["rope_freqs.weight"].data
    assert factors.shape == (8,)
    assert factors[0] == pytest.approx(1.0)  # a short wavelength stays
    assert factors[-1] == pytest.approx(8.0)  # a long one is stretched


def test_a_tokenizer_goes_along(pools: Pools, ternary: Path, tmp_path: Path) -> None:
    export(pools, "to_gguf", ternary, tmp_path / "bytes.gguf")
    assert field(tmp_path / "bytes.gguf", "tokenizer.ggml.model") == "gpt2"
    assert len(field(tmp_path / "bytes.gguf", "tokenizer.ggml.tokens")) == 257
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": " ".join(WORDS["english"][n:] * 3)}) + "\n" for n in range(12)))
    tokenizer = train_tokenizer([texts], 300, tmp_path / "tokenizer")
    prepare([texts], tokenizer.spec, tmp_path / "stream", workers=1, progress=False)
    checkpoint = trained(pools, tmp_path / "run", str(tmp_path / "stream"), tokenizer=tokenizer.spec)
    export(pools, "to_gguf", checkpoint, tmp_path / "pieces.gguf")
    assert field(tmp_path / "pieces.gguf", "tokenizer.ggml.model") == "llama"
    assert len(field(tmp_path / "pieces.gguf", "tokenizer.ggml.tokens")) == tokenizer.vocab_size
    assert field(tmp_path / "pieces.gguf", "tokenizer.ggml.eos_token_id") == tokenizer.eod


class TestLlamaCpp:
    """The client itself; `make llama-cpp` builds it."""

    @pytest.fixture
    def llama(self) -> Any:
        return pytest.importorskip("llama_cpp", reason="llama.cpp is built by `make llama-cpp`").Llama

    @pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "f32"])
    def test_it_says_the_tokens_of_the_engine(
        self, pools: Pools, llama: Any, ternary: Path, tmp_path: Path, kind: str
    ) -> None:
        file = tmp_path / "model.gguf"
        export(pools, "to_gguf", ternary, file, kind=kind, plain="f32")
        due = ask(pools, "continued", checkpoint=str(ternary), prompts=PROMPTS, count=64)
        model = llama(str(file), n_ctx=128, n_threads=1, verbose=False)
        for prompt, tokens in zip(PROMPTS, due, strict=True):
            found = []
            for token in model.generate(prompt, temp=0.0):
                found.append(token)
                if len(found) == 64:
                    break
            assert found == tokens
        assert len(set(due[0])) > 8

    def test_it_splits_text_as_the_tokenizer_does(
        self, pools: Pools, llama: Any, ternary: Path, tmp_path: Path
    ) -> None:
        export(pools, "to_gguf", ternary, tmp_path / "model.gguf")
        model = llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
        text = "Hello,  wörld! \n\t it's . 漢字 x".encode()
        assert model.tokenize(text, add_bos=False) == list(text)
        assert model.detokenize(list(text)) == text
