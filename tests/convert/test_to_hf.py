"""A Hugging Face export is a Llama that computes what the checkpoint computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacpt.config import ModelConfig
from megacpt.convert.families import check_llama, check_names
from megacpt.data.prepare import prepare
from megacpt.data.tokenizer import load_tokenizer
from megacpt.data.train_tokenizer import train_tokenizer
from megacpt.errors import ConfigError
from tests.cli.command import megacpt as command
from tests.convert.exports import TERNARY, ask, export, refused, trained
from tests.pool import Pools
from tests.small import MODEL, WORDS, make_stream

transformers = pytest.importorskip("transformers", reason="the package transformers (extra hf) loads the exports")
TOKENS = list(b"the old ship and the wind \xff at night")
MODELS: dict[str, dict[str, Any]] = {
    "ternary": {"quantise": TERNARY, "heads": 4, "kv_heads": 2},
    "shards": {"quantise": {"grid": "ternary", "scale": {"scope": "shard", "shards": 2}}, "kv_heads": 2},
    "quest": {"quantise": {"grid": "quest", "bits": 4, "scale": {"scope": "group", "group": 16}}},
    "float": {
        "bias": True,
        "tied_embeddings": True,
        "rope": {"base": 500.0, "scaling": {"kind": "linear", "factor": 4}},
    },
    "llama3": {
        "activation": "geglu",
        "head_dim": 24,
        "rope": {"scaling": {"kind": "llama3", "factor": 8, "original_length": 16}},
    },
}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_stream(tmp_path_factory.mktemp("streams"), "english"))


@pytest.fixture(scope="module")
def plain(pools: Pools, stream: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(pools, tmp_path_factory.mktemp("runs") / "float", stream)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_engine(pools: Pools, stream: str, tmp_path: Path, name: str) -> None:
    checkpoint = trained(pools, tmp_path / "run", stream, steps=12, model=MODELS[name])
    export(pools, "to_hf", checkpoint, tmp_path / "hf", shard_bytes=30_000)
    due = ask(pools, "logits", checkpoint=str(checkpoint), tokens=TOKENS)
    found = logits(loaded(tmp_path / "hf"))
    assert found.shape == (len(TOKENS), 257)
    np.testing.assert_allclose(found, due, atol=1e-4)
    # Positions matter in this model: with other ones the logits are others.
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rope_theta": 2.0, "rope_scaling": None}))
    assert np.abs(logits(loaded(tmp_path / "hf")) - due).max() > 1e-3


def test_the_command_writes_the_dtype_that_is_asked_for(plain: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        done = command("convert", "to-hf", plain, "--dtype", dtype, "--out", dtype, folder=tmp_path)
        assert done.status == 0, done.err
        assert f"made: {dtype}" in done.err
        assert "the same function" in done.err
    exact, short = loaded(tmp_path / "float32"), loaded(tmp_path / "bfloat16", torch.bfloat16)
    assert short.config.dtype == torch.bfloat16
    for (name, due), found in zip(exact.named_parameters(), short.parameters(), strict=True):
        assert torch.equal(found, due.to(torch.bfloat16)), name


def test_bytes_are_a_tokenizer_that_gives_the_same_ids(pools: Pools, plain: Path, tmp_path: Path) -> None:
    export(pools, "to_hf", plain, tmp_path / "hf")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello,  wörld! \n\n\t it's 漢字.  x \x00\x7f"
    assert found(text)["input_ids"] == list(text.encode())
    assert found.decode(list(text.encode())) == text
    assert found.eos_token_id == load_tokenizer("bytes").eod
    # Megacpt reads the files of the export, too.
    ours = load_tokenizer(tmp_path / "hf")
    assert ours.encode(text).tolist() == list(text.encode())
    assert ours.eod == 256


def test_a_sentencepiece_model_goes_along(pools: Pools, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": " ".join(WORDS["english"][n:] * 3)}) + "\n" for n in range(12)))
    tokenizer = train_tokenizer([texts], 300, tmp_path / "tokenizer")
    prepare([texts], tokenizer.spec, tmp_path / "stream", workers=1, progress=False)
    checkpoint = trained(pools, tmp_path / "run", str(tmp_path / "stream"), tokenizer=tokenizer.spec)
    export(pools, "to_hf", checkpoint, tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").fingerprint == tokenizer.fingerprint
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eod
    assert config["vocab_size"] == tokenizer.vocab_size
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the old ship", " the old ship", "sea  and\nwind", "Über 12 ships"):
        assert theirs.encode(text) == list(tokenizer.encode(text))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"qk_norm": True}, "model.qk_norm: a Llama does not normalise"),
        ({"rope": {"share": 0.25}}, "model.rope.share: a Llama rotates all dimensions of a head, not 0.25"),
        ({"qkv_bias": True}, "model.qkv_bias: a Llama with biases"),
        ({"activation": "gelu"}, "model.activation: gelu has no gate"),
        ({"moe": {"experts": 4, "top_k": 1}}, "the matrices of a Llama, which has no experts"),
    ],
)
def test_what_is_no_llama_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_llama(ModelConfig.model_validate({**MODEL, **changes}))


def test_every_reason_is_given_at_once() -> None:
    model = ModelConfig.model_validate({**MODEL, "qk_norm": True, "rope": {"share": 0.5}})
    check_names(model)  # it has names all the same, and can be packed
    with pytest.raises(ConfigError, match=r"(?s)qk_norm.*rope\.share"):
        check_llama(model)


def test_a_refused_model_leaves_nothing(pools: Pools, stream: str, tmp_path: Path) -> None:
    checkpoint = trained(pools, tmp_path / "run", stream, model={"qk_norm": True, "rope": {"share": 0.5}})
    found = refused(pools, "to_hf", checkpoint, tmp_path / "hf")
    assert found is not None
    assert found[0] == "ConfigError"
    assert "a Qwen 3: model.rope.share: a Qwen 3 rotates all dimensions of a head, not 0.5 of them" in found[1]
    found = refused(pools, "to_hf", checkpoint, tmp_path / "hf", family="qwen2")
    assert found is not None
    assert "model.qk_norm: a Qwen 2 does not normalise queries and keys" in found[1]
    found = refused(pools, "to_hf", checkpoint, tmp_path / "hf", family="qwen1")
    assert found is not None
    assert "--family qwen1; did you mean 'qwen" in found[1]
    assert not [path for path in tmp_path.iterdir() if "hf" in path.name]
