"""Checkpoints of Megatron's own GPT model come in and go out with their function; what does not fit is refused."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacpt.config import ModelConfig
from megacpt.continuation.ledger import Ledger
from megacpt.convert.families.megatron import MEGATRON
from megacpt.convert.megatron_names import arguments, model_keys, to_ours, to_theirs
from megacpt.errors import ConfigError
from tests.pool import Pools

CASES = "tests.convert.megatron_cases"
LLAMA: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 16, "normalization": "RMSNorm", "norm_epsilon": 1e-5,
    "swiglu": True, "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True, "rotary_percent": 1.0, "rotary_base": 100,
    "position_embedding_type": "rope", "max_position_embeddings": 64, "padded_vocab_size": 320,
}  # fmt: skip
QWEN = {**LLAMA, "add_qkv_bias": True, "qk_layernorm": True, "untie_embeddings_and_output_weights": False}
NEOX = {**LLAMA, "swiglu": False, "normalization": "LayerNorm", "add_bias_linear": True, "rotary_percent": 0.5}
EXPERTS = {
    **LLAMA, "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48,
    "moe_shared_expert_intermediate_size": 32, "moe_layer_freq": [0, 1, 1, 1], "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}  # fmt: skip
DENSE = {"llama": LLAMA, "qwen": QWEN, "neox": NEOX}


def megatron(pools: Pools, folder: Path, args: dict[str, Any], **options: Any) -> np.ndarray:
    found: np.ndarray = pools(1).run(f"{CASES}:saved_by_megatron", folder=str(folder), args=args, **options)[0]
    return found


def adopt(pools: Pools, source: Path, out: Path, ranks: int = 1, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = pools(ranks).run(f"{CASES}:adopted", source=str(source), out=str(out), **options)[0]
    return found


@pytest.mark.parametrize("name", DENSE)
def test_the_function_comes_in_and_goes_out(pools: Pools, tmp_path: Path, name: str) -> None:
    theirs = megatron(pools, tmp_path / "megatron", DENSE[name])
    found = adopt(pools, tmp_path / "megatron", tmp_path / "run")
    assert "error" not in found, found
    ours = pools(1).run(f"{CASES}:logits", run=str(tmp_path / "run"))[0]
    assert np.abs(theirs).max() > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    ledger = Ledger.read(Path(found["checkpoint"]))
    assert ledger.derived is not None
    assert ledger.derived["operation"] == "from-megatron"

    back = pools(1).run(f"{CASES}:written_for_megatron", run=str(tmp_path / "run"), out=str(tmp_path / "back"))[0]
    assert back["lost"] == []
    np.testing.assert_array_equal(back["logits"], theirs)
    again = {**ledger.model, "name": None}
    assert ModelConfig.model_validate({**again, **back["keys"], "name": None}).model_dump() == again


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_it_loads_in_any_layout(pools: Pools, tmp_path: Path, layout: str) -> None:
    theirs = megatron(pools, tmp_path / "megatron", QWEN)
    adopt(pools, tmp_path / "megatron" / "iter_0000007", tmp_path / "run", ranks=2)
    alone = pools(1).run(f"{CASES}:losses", run=str(tmp_path / "run"))[0]
    spread = pools(2).run(f"{CASES}:losses", run=str(tmp_path / "run"), overrides=[layout])[0]
    np.testing.assert_allclose(spread, alone, rtol=1e-6)
    assert theirs.shape[-1] == 320


def test_experts_come_in_and_go_out(pools: Pools, tmp_path: Path) -> None:
    """Bitwise: saved by Megatron, adopted, written, and loaded by Megatron again."""
    megatron(pools, tmp_path / "megatron", EXPERTS)
    found = adopt(pools, tmp_path / "megatron", tmp_path / "run")
    assert "error" not in found, found
    model = Ledger.read(Path(found["checkpoint"])).model
    assert (model["moe"]["first_dense"], model["moe"]["balance"]["kind"], model["moe"]["score"]) == (
        1,
        "bias",
        "sigmoid",
    )
    out = tmp_path / "back"
    back = pools(1).run(f"{CASES}:written_for_megatron", run=str(tmp_path / "run"), out=str(out))[0]
    assert back["lost"] == []
    paths = [str(tmp_path / "megatron" / "iter_0000007"), str(out / "release")]
    assert pools(1).run(f"{CASES}:different", folders=paths)[0] == []


def test_without_arguments_the_network_has_to_be_named(pools: Pools, tmp_path: Path) -> None:
    megatron(pools, tmp_path / "megatron", LLAMA, with_args=False)
    kind, text = adopt(pools, tmp_path / "megatron", tmp_path / "run")["error"]
    assert (kind, "--model" in text) == ("ConfigError", True)
    keys = {**model_keys(LLAMA), "vocab_size": 320}
    (tmp_path / "model.yaml").write_text(str(keys).replace("'", '"').replace("True", "true").replace("False", "false"))
    found = adopt(pools, tmp_path / "megatron", tmp_path / "run", model=str(tmp_path / "model.yaml"))
    assert "error" not in found, found
    keys["layers"] = 3
    (tmp_path / "other.yaml").write_text(str(keys).replace("'", '"').replace("True", "true").replace("False", "false"))
    kind, text = adopt(pools, tmp_path / "megatron", tmp_path / "x", model=str(tmp_path / "other.yaml"))["error"]
    assert kind == "CheckpointError"
    assert "decoder.layers.3." in text
    assert not (tmp_path / "x").exists()


def test_what_is_damaged_is_named_and_nothing_is_left(pools: Pools, tmp_path: Path) -> None:
    megatron(pools, tmp_path / "nan", LLAMA, nan=True)
    kind, text = adopt(pools, tmp_path / "nan", tmp_path / "x")["error"]
    assert kind == "CheckpointError"
    assert "final_layernorm" in text
    assert not (tmp_path / "x").exists()

    megatron(pools, tmp_path / "cut", LLAMA)
    shutil.copytree(tmp_path / "cut", tmp_path / "lost")
    (tmp_path / "lost" / "iter_0000007" / ".metadata").unlink()
    kind, text = adopt(pools, tmp_path / "lost", tmp_path / "x")["error"]
    assert kind == "CheckpointError"
    assert "torch_dist" in text
    torch.save({"args": Namespace(**LLAMA), "code": ConfigError}, tmp_path / "cut" / "iter_0000007" / "common.pt")
    kind, text = adopt(pools, tmp_path / "cut", tmp_path / "x")["error"]
    assert kind == "CheckpointError"
    assert "more than plain settings" in text
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type: learned_absolute"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p: True"),
        ({"squared_relu": True, "swiglu": False}, "squared_relu: True"),
        ({"multi_latent_attention": True}, "multi_latent_attention: True"),
        ({"num_experts": 4, "add_bias_linear": True}, "experts have no biases"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_arguments_that_ask_for_more_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        model_keys({**LLAMA, **changes})


def test_layers_of_experts_at_odd_places_are_refused() -> None:
    with pytest.raises(ConfigError, match="moe_layer_freq"):
        model_keys({**EXPERTS, "moe_layer_freq": [1, 1, 0, 1]})


@pytest.mark.parametrize("args", [LLAMA, QWEN, NEOX, EXPERTS])
def test_arguments_say_the_same_both_ways(args: dict[str, Any]) -> None:
    model = ModelConfig.model_validate({**model_keys(args), "vocab_size": 320})
    MEGATRON.check(model)
    assert model_keys(vars(arguments(model, 320))) == model_keys(args)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel_residual": True}, "parallel_residual"),
        ({"norm_place": "output"}, "norm_place"),
        ({"sub_norm": True}, "sub_norm"),
        ({"qk_norm": "all_heads"}, "qk_norm"),
        ({"window": 8}, "window"),
    ],
)
def test_networks_that_megatron_does_not_compute_are_refused(changes: dict[str, Any], said: str) -> None:
    model = ModelConfig.model_validate({**model_keys(LLAMA), "vocab_size": 320, **changes})
    with pytest.raises(ConfigError, match=said):
        MEGATRON.check(model)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("word", ["weight", "bias"])
def test_names_go_both_ways(experts: bool, word: str) -> None:
    names = [f"{name}.{word}" for name in ("input_layernorm", "pre_mlp_layernorm", "self_attention.linear_qkv")]
    names += ["mlp.experts.linear_fc1.weight", "mlp.router.choice_bias", "mlp.router.weight"] if experts else []
    for name in names:
        assert {to_ours(theirs) for theirs in to_theirs(name, experts)} == {name}
    assert to_theirs("mlp.router.log_u", experts) == []
    assert to_ours("mlp.unknown.weight") is None
