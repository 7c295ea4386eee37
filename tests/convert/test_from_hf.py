"""A model of Hugging Face becomes a run that is continued and written back; what is wrong with it is told by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megacpt.checkpoint.store import checkpoints
from megacpt.config import load_run
from megacpt.continuation.ledger import Ledger
from megacpt.convert.packed_folder import CONFIG
from megacpt.data.tokenizer import load_tokenizer
from tests.cli.command import megacpt as command
from tests.convert.exports import ask, export, refused
from tests.convert.hf_models import VOCAB, edit, loaded, logits, save, tensors
from tests.convert.memory import peak_of
from tests.pool import Pools
from tests.small import make_stream

pytest.importorskip("transformers", reason="the package transformers (extra hf) makes the models to convert")
PROMPT = list(b"the old ship and the wind")
NAME = "model.layers.1.mlp.up_proj.weight"


def change(folder: Path, **keys: Any) -> None:
    """Change keys of config.json; None as a value removes a key."""
    path = folder / CONFIG
    found = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def fails(pools: Pools, source: Path, out: Path, **options: Any) -> str:
    """Convert what must be refused, and leave nothing; return the error."""
    found = refused(pools, "from_hf", source, out, **{"tokenizer": "bytes", **options})
    assert found is not None
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if "partial" in path.name]
    return found[1]


def test_the_main_path(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "tiny", torch.bfloat16)
    stream = make_stream(tmp_path, "english")
    stage = {
        "stage": {"name": "english", "tokens": 256, "mixture": {"english": str(stream)}},
        "schedule": {"kind": "rewarmed_cosine", "warmup": "2 steps"},
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage))
    done = command("convert", "from-hf", "tiny", "--out", "run", "--tokenizer", "bytes", folder=tmp_path)
    assert done.status == 0, done.err
    assert "made: run\n" in done.err
    assert "the same function" in done.err
    begin = ("continue", "run", "stage.yaml", "--run", "next")
    done = command(*begin, folder=tmp_path)
    assert done.status == 2
    assert "has no settings of training to go on with: the stage has to give optim and batch" in done.err
    done = command(*begin, "optim.peak_lr=1e-3", "batch.sequences=2", "batch.seq_length=32", folder=tmp_path)
    assert done.status == 0, done.err
    assert "at step 0" not in done.err
    done = command("convert", "to-hf", "next", "--out", "back", folder=tmp_path)
    assert done.status == 0, done.err
    before, after = tensors(tmp_path / "tiny"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}  # the run goes on in that of the model
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert type(loaded(tmp_path / "back")).__name__ == "Qwen2ForCausalLM"
    done = command("lineage", "show", ".", folder=tmp_path)
    assert "from-hf (family qwen2, source tiny" in done.out


def test_what_the_ledger_keeps(pools: Pools, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "tiny")
    change(source, mystery=[1], attention_dropout=0.1)
    export(pools, "from_hf", source, tmp_path / "run", tokenizer="bytes")
    ledger = Ledger.read_file(tmp_path / "run" / "start.json")
    assert ledger.derived is not None
    assert ledger.derived["operation"] == "from-hf"
    assert ledger.derived["not_understood"] == {"mystery": [1]}
    assert ledger.derived["notes"] == ["attention_dropout: 0.1: stages here train without dropout"]
    assert ledger.derived["files"] == {"model.safetensors": (source / "model.safetensors").stat().st_size}
    assert (ledger.tokens, ledger.model["vocab_size"], ledger.model["vocab_multiple"]) == (0, VOCAB, 32)
    found = refused(pools, "from_hf", source, tmp_path / "run", tokenizer="bytes")
    assert found is not None
    assert "exists: choose another --out" in found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_of_half_the_size_computes_the_same(pools: Pools, tmp_path: Path, dtype: str) -> None:
    source = save("mixtral", tmp_path / "tiny", getattr(torch, dtype))
    sizes, found = [], []
    for kept in ("float32", dtype):
        run = tmp_path / kept
        export(pools, "from_hf", source, run, tokenizer="bytes", dtype=kept, workers=2)
        sizes.append(sum(path.stat().st_size for path in run.rglob("*.distcp")))
        case: dict[str, Any] = {"checkpoint": str(run), "prompts": [PROMPT], "overrides": ["precision=float32"]}
        found.append(pools(1).run("tests.convert.hf_cases:logits", **case)[0][0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], logits(loaded(source), PROMPT), atol=1e-4)
    assert sizes[1] < 0.8 * sizes[0]


def test_ranks_share_the_work(pools: Pools, tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "tiny", max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    pools(2).run(
        "tests.convert.export_cases:export",
        operation="from_hf",
        checkpoint=str(source),
        out=str(tmp_path / "run"),
        tokenizer="bytes",
    )
    export(pools, "to_hf", tmp_path / "run", tmp_path / "back")
    came, gone = tensors(source), tensors(tmp_path / "back")
    assert came.keys() == gone.keys()
    assert all(torch.equal(came[name], gone[name]) for name in came)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_are_stored_together(pools: Pools, tmp_path: Path, name: str) -> None:
    due = tensors(save(name, tmp_path / "apart"))
    save(name, tmp_path / "together", save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors(tmp_path / "together"))
    export(pools, "from_hf", tmp_path / "together", tmp_path / "run", tokenizer="bytes")
    export(pools, "to_hf", tmp_path / "run", tmp_path / "back")
    found = tensors(tmp_path / "back")
    assert found.keys() == due.keys()
    assert all(torch.equal(found[key], due[key]) for key in due)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": "lama"}, r"model_type lama; did you mean 'llama'\? is no family here: llama, mistral"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act: gelu_pytorch_tanh: no network here has this activation"),
        ({"mlp_bias": True}, "attention_bias, mlp_bias: false, true"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters: dynamic: positions are"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_scaling: longrope"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: gptq: weights in this form"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "model.kv_heads: 3 does not divide heads"),
        ({"vocab_size": 300}, r"model.embed_tokens.weight is \[288, 32\], and \[300, 32\] is due"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight \[32\] is missing in all 1 files"),
        (
            {"num_hidden_layers": 1},
            r"model.layers.1.[a-z_.]*weight \[.*\] is no tensor of the network that config.json describes",
        ),
    ],
)
def test_settings_that_cannot_be_converted(pools: Pools, tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    change(save("llama", tmp_path / "tiny"), **keys)
    error = fails(pools, tmp_path / "tiny", tmp_path / "run")
    assert re.search(says, error), error


def test_settings_of_other_families(pools: Pools, tmp_path: Path) -> None:
    for name, keys, says in (
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1},
            "max",
        ),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, "hidden_act: gelu_fast: an MLP without a gate has the exact GELU"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ("bitnet", {"quantization_config": {"quant_method": "bitnet"}}, "each projection has a scale of its own"),
        ("deepseek_v3", {"topk_group": 1}, "topk_group: 1 of 4 with num_experts_per_tok 4"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: False"),
        ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 4}, "mlp_only_layers"),
    ):
        if not (tmp_path / name).exists():
            save(name, tmp_path / name)
        before = (tmp_path / name / CONFIG).read_text()
        change(tmp_path / name, **keys)
        assert says in fails(pools, tmp_path / name, tmp_path / "run")
        (tmp_path / name / CONFIG).write_text(before)


def test_settings_as_older_programs_write_them(pools: Pools, tmp_path: Path) -> None:
    due = logits(loaded(save("gpt_neox", tmp_path / "neox")), PROMPT)  # `ask` gives what the tokenizer has
    change(tmp_path / "neox", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=8)
    edit(
        tmp_path / "neox",
        lambda found: found.update({"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}),
    )
    export(pools, "from_hf", tmp_path / "neox", tmp_path / "run", tokenizer="bytes")
    np.testing.assert_allclose(
        ask(pools, "logits", checkpoint=str(tmp_path / "run"), tokens=PROMPT), due[:, :257], atol=1e-4
    )
    save("llama3", tmp_path / "llama")
    rope = json.loads((tmp_path / "llama" / CONFIG).read_text())["rope_parameters"]
    change(tmp_path / "llama", rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    export(pools, "from_hf", tmp_path / "llama", tmp_path / "run2", tokenizer="bytes")
    model = load_run(tmp_path / "run2" / "run.yaml").model
    assert model.rope.scaling is not None
    assert (model.rope.base, model.rope.scaling.kind, model.bias) == (100.0, "llama3", True)


def test_wrong_tensors_are_named_before_anything_is_read(pools: Pools, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "tiny")

    def spoil(found: dict[str, torch.Tensor]) -> None:
        found[NAME] = torch.zeros(47, 32)
        del found["lm_head.weight"]
        found["extra.weight"] = torch.full((2,), torch.nan)
        found["model.norm.weight"] = torch.ones(32, dtype=torch.uint8)

    edit(source, spoil)
    error = fails(pools, source, tmp_path / "run")
    assert f"model.safetensors: {NAME} is [47, 32], and [48, 32] is due" in error
    assert "lm_head.weight [288, 32] is missing in all 1 files" in error
    assert "model.safetensors: extra.weight [2] is no tensor of the network that config.json describes" in error
    assert "model.safetensors: model.norm.weight is uint8, and weights are floating-point numbers" in error


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_what_is_no_number_is_named(pools: Pools, tmp_path: Path, number: float) -> None:
    source = save("llama", tmp_path / "tiny")
    edit(source, lambda found: found[NAME].view(-1)[77:78].fill_(number))
    for workers in (1, 2):
        error = fails(pools, source, tmp_path / "run", workers=workers)
        assert f"model.safetensors: {NAME} holds numbers that are infinite or not a number" in error


def test_damaged_files_are_named(pools: Pools, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "tiny")
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for content, says in (
        (whole[:-100], "model.safetensors is cut off: it has"),
        (whole[:50], "model.safetensors is cut off or no safetensors file"),
        (whole[:4], "model.safetensors is damaged: its header"),
        (whole[:8] + b"x" + whole[9:], "model.safetensors is damaged: its header"),
    ):
        file.write_bytes(content)
        assert says in fails(pools, source, tmp_path / "run")
    file.write_bytes(whole)
    index = {"weight_map": dict.fromkeys(tensors(source), "model.safetensors") | {NAME: "model-2.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors is missing, and model.safetensors.index.json" in fails(pools, source, tmp_path / "run")
    (source / CONFIG).unlink()
    assert "config.json cannot be read" in fails(pools, source, tmp_path / "run")


def test_pickles_are_read_only_where_that_is_allowed(pools: Pools, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "tiny")
    found = tensors(source)
    (source / "model.safetensors").unlink()
    torch.save(found, source / "pytorch_model.bin")
    error = fails(pools, source, tmp_path / "run")
    assert "holds its weights as pickles only (pytorch_model.bin)" in error
    assert "--allow-pickle" in error
    export(pools, "from_hf", source, tmp_path / "run", tokenizer="bytes", allow_pickle=True)
    export(pools, "to_hf", tmp_path / "run", tmp_path / "back")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(tmp_path / "back").items())
    torch.save({**found, "evil": print}, source / "pytorch_model.bin")
    assert "pytorch_model.bin is damaged, or holds more than tensors" in fails(
        pools, source, tmp_path / "again", allow_pickle=True
    )


def test_matrices_in_8_bits_are_multiplied_with_their_scales(pools: Pools, tmp_path: Path) -> None:
    source = save("deepseek_v3", tmp_path / "tiny")
    name = "model.layers.1.self_attn.o_proj.weight"

    def shorten(found: dict[str, torch.Tensor]) -> None:
        found[name] = (found[name] * 4).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = torch.tensor([[0.25]])
        found["model.layers.2.embed_tokens.weight"] = torch.zeros(3)

    edit(source, shorten)
    found = tensors(source)
    change(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    export(pools, "from_hf", source, tmp_path / "run", tokenizer="bytes")
    export(pools, "to_hf", tmp_path / "run", tmp_path / "back")
    assert torch.equal(tensors(tmp_path / "back")[name], found[name].float() / 4)
    ledger = Ledger.read_file(tmp_path / "run" / "start.json")
    assert ledger.derived is not None
    assert "left out, a layer that predicts further tokens: 1 tensors" in ledger.derived["notes"]
    edit(source, lambda found: found.pop(f"{name}_scale_inv"))
    assert f"{name} is in 8 bits, and {name}_scale_inv [1, 1] is missing" in fails(pools, source, tmp_path / "other")


def test_the_tokenizer_travels_along(pools: Pools, tmp_path: Path) -> None:
    plain = save("llama", tmp_path / "plain")
    assert "holds no tokenizer (tokenizer.json or tokenizer.model)" in fails(
        pools, plain, tmp_path / "run", tokenizer=None
    )
    export(pools, "from_hf", plain, tmp_path / "bytes", tokenizer="bytes")
    export(pools, "to_hf", tmp_path / "bytes", tmp_path / "source")  # has the files of a tokenizer
    source = tmp_path / "source"
    (source / "tokenizer_config.json").unlink()
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<stop>"  # no usual name: only config.json knows that it ends texts
    content["model"]["vocab"] = {word: n for word, n in content["model"]["vocab"].items() if n < 256} | {"<stop>": 256}
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    change(source, eos_token_id=[256, 3])
    export(pools, "from_hf", source, tmp_path / "run")
    found = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert found.eod == 256
    export(pools, "to_hf", tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["eos_token"] == "<stop>"
    small = save("llama", tmp_path / "small")
    edit(
        small,
        lambda found: found.update({key: found[key][:200].clone() for key in found if "embed" in key or "head" in key}),
    )
    change(small, vocab_size=200)
    assert "has 257 ids, and the embedding" in fails(pools, small, tmp_path / "other")


def test_a_killed_conversion_begins_again(pools: Pools, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "tiny")
    left = tmp_path / "run" / "checkpoints" / ".step-00000000.partial"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    export(pools, "from_hf", source, tmp_path / "run", tokenizer="bytes")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    stream = str(make_stream(tmp_path, "english", 4))
    model = {"layers": 2, "hidden": 768, "ffn": 2048, "heads": 8, "kv_heads": 8, "vocab_size": 16_000}
    peak, whole = peak_of(tmp_path, stream, model, "from_hf")
    embedding = 4 * 16_000 * 768
    assert 2 * whole > 3 * embedding  # it is stored in 16 bits
    assert peak < 1.3 * embedding, f"{peak / embedding:.2f} embeddings"


def test_an_interrupted_conversion_goes_on(pools: Pools, tmp_path: Path) -> None:
    folder, run = save("llama", tmp_path / "hf"), tmp_path / "run"
    told = {"folder": str(folder), "out": str(run)}
    assert pools(1).run("tests.convert.hf_cases:told", **told, stop=9)[0] == 9
    assert not list(run.glob("checkpoints/step-*"))
    rest = pools(1).run("tests.convert.hf_cases:told", **told)[0]
    whole = pools(1).run("tests.convert.hf_cases:told", folder=str(folder), out=str(tmp_path / "whole"))[0]
    assert rest == whole - 9
    same = [str(checkpoints(made)[-1]) for made in (run, tmp_path / "whole")]
    assert pools(1).run("tests.convert.cases:different_weights", checkpoints=same)[0] == []


def test_what_was_interrupted_of_other_files_is_not_taken(pools: Pools, tmp_path: Path) -> None:
    folder, run = save("llama", tmp_path / "hf"), tmp_path / "run"
    told = {"folder": str(folder), "out": str(run)}
    pools(1).run("tests.convert.hf_cases:told", **told, stop=9)
    edit(folder, lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    rest = pools(1).run("tests.convert.hf_cases:told", **told)[0]
    assert rest == pools(1).run("tests.convert.hf_cases:told", folder=str(folder), out=str(tmp_path / "whole"))[0]
