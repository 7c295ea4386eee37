"""What a rank runs beside Megatron's stock GPT model: saving it, loading what was written for it, and its logits."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.safe_globals import SAFE_GLOBALS
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpt.continuation.opened import open_model
from megacpt.convert.adopt import adopt
from megacpt.convert.megatron import open_megatron, to_megatron
from megacpt.convert.megatron_names import model_keys
from megacpt.convert.neox import open_neox
from megacpt.errors import MegacptError
from megacpt.runtime.layout import Layout, enter_layout

LENGTH = 24
ROWS = 320


def _ids() -> torch.Tensor:
    return torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % 250


def _stock(args: dict[str, Any]) -> GPTModel:
    """Megatron's GPT model of its own layer spec, with random weights that tell everything apart."""
    enter_layout(Layout(), seed=1)
    given = Namespace(**args)
    experts = args.get("num_experts")
    config = TransformerConfig(
        num_layers=given.num_layers,
        hidden_size=given.hidden_size,
        ffn_hidden_size=given.ffn_hidden_size,
        num_attention_heads=given.num_attention_heads,
        num_query_groups=given.num_query_groups,
        kv_channels=given.kv_channels,
        normalization=given.normalization,
        layernorm_epsilon=given.norm_epsilon,
        gated_linear_unit=given.swiglu,
        activation_func=F.silu if given.swiglu else F.gelu,
        add_bias_linear=given.add_bias_linear,
        add_qkv_bias=given.add_qkv_bias,
        qk_layernorm=given.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        num_moe_experts=experts,
        moe_router_topk=args.get("moe_router_topk", 2),
        moe_ffn_hidden_size=args.get("moe_ffn_hidden_size"),
        moe_shared_expert_intermediate_size=args.get("moe_shared_expert_intermediate_size"),
        moe_layer_freq=args.get("moe_layer_freq", 1),
        moe_router_enable_expert_bias=args.get("moe_router_enable_expert_bias", False),
        moe_router_score_function=args.get("moe_router_score_function", "softmax"),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    if experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=given.qk_layernorm, normalization=given.normalization)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=ROWS,
        max_sequence_length=64,
        parallel_output=False,
        share_embeddings_and_output_weights=not given.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=given.rotary_percent,
        rotary_base=given.rotary_base,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=draw) * 0.15
                weight.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def _weights(model: GPTModel) -> dict[str, Any]:
    state: dict[str, Any] = model.sharded_state_dict()
    return {name: part for name, part in state.items() if "_extra_state" not in name}


def saved_by_megatron(
    folder: str, args: dict[str, Any], with_args: bool = True, nan: bool = False
) -> np.ndarray | None:
    """Save a stock model as Megatron-LM does; return its logits, where it is dense."""
    model = _stock(args)
    if nan:
        model.decoder.final_layernorm.weight.data[3] = float("nan")
    iteration = Path(folder) / "iter_0000007"
    iteration.mkdir(parents=True)
    common: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 7}
    if with_args:
        common["args"] = Namespace(**args)
    dist_checkpointing.save({**_weights(model), **common}, str(iteration))
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")
    return None if args.get("num_experts") else _logits(model)


def _logits(model: Any, **options: Any) -> np.ndarray:
    """[b, s, V]."""
    ids = _ids()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        found: np.ndarray = model(ids, torch.arange(LENGTH)[None], mask, **options).numpy()
    return found


def adopted(source: str, out: str, kind: str = "megatron", model: str | None = None, **options: Any) -> dict[str, Any]:
    """Convert a checkpoint; ``logits`` of the result, or ``error``: kind and text."""
    try:
        if "settings" in options:
            options["settings"] = Path(options["settings"])
        foreign = open_megatron(Path(source), model) if kind == "megatron" else open_neox(Path(source), **options)
        made = adopt(foreign, Path(out), "bytes", f"from-{kind}")
    except MegacptError as error:
        return {"error": (type(error).__name__, str(error))}
    return {"checkpoint": str(made), "notes": foreign.notes}


def logits(run: str, *overrides: str) -> np.ndarray:
    """Of a run here, in a layout, [b, s, V]; every rank gets them."""
    engine, _, _ = open_model(Path(run), overrides=overrides)
    engine.chunks[0].eval()
    with torch.no_grad():
        found: np.ndarray = engine.chunks[0](_ids(), None, None, runtime_gather_output=True).numpy()
    return found


def written_for_megatron(run: str, out: str) -> dict[str, Any]:
    """Export a run, load it into a stock model; ``logits``, ``args``, ``missing`` names, or ``error``."""
    try:
        to_megatron(Path(run), Path(out))
    except MegacptError as error:
        return {"error": (type(error).__name__, str(error))}
    folder = Path(out) / (Path(out) / "latest_checkpointed_iteration.txt").read_text()
    with torch.serialization.safe_globals(SAFE_GLOBALS):  # as Megatron-LM does when it starts
        args = vars(dist_checkpointing.load_common_state_dict(str(folder))["args"])
        model = _stock(args)
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(float("nan"))
        dist_checkpointing.load(_weights(model), str(folder))
    lost = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    shown = None if args.get("num_experts") else _logits(model)
    return {"logits": shown, "lost": lost, "keys": model_keys(args), "stored": _stored(folder)}


def _stored(folder: Path) -> list[str]:
    return sorted(dist_checkpointing.load_tensors_metadata(str(folder)))


def losses(run: str, overrides: list[str] | None = None) -> np.ndarray:
    """Loss of each token of a batch, in a layout."""
    from megacpt.engine.protocol import Batch

    engine, _, _ = open_model(Path(run), overrides=overrides or [])
    tokens = np.tile(_ids().numpy(), (engine.data_size, 1))
    return np.array(engine.predict([Batch(tokens[engine.data_rank * 2 :][:2])]).nats)


def different(folders: list[str]) -> list[str]:
    """Names of the weights in which two checkpoints of Megatron's are not bitwise the same, whatever their names."""
    from megacpt.convert.megatron import MegatronFiles

    ours, theirs = (MegatronFiles(Path(folder)) for folder in folders)
    found = sorted(ours.tensors.keys() ^ theirs.tensors.keys())
    for name in ours.tensors.keys() & theirs.tensors.keys():
        pairs = zip(ours.blocks(name), theirs.blocks(name), strict=True)
        if not all(first == other and torch.equal(a, b) for (first, a), (other, b) in pairs):
            found.append(name)
    return found


def neox_of(run: str, folder: str, ranks: int, per_layer: bool, naming: str) -> None:
    """Write a run as GPT-NeoX would have saved it, from the tensors of its export; a rank's parts are views of them."""
    from megacpt.convert.neox import _BLOCK, _OUTSIDE
    from megacpt.convert.to_hf import to_hf

    exported = Path(folder).with_suffix(".hf")
    to_hf(Path(run), exported)
    from safetensors.torch import load_file

    tensors = {name: tensor for path in exported.glob("*.safetensors") for name, tensor in load_file(path).items()}
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    block = {key: value for key, value in _BLOCK.items() if "mlp" not in key or (naming in key)}
    Path(folder).mkdir(parents=True)
    for rank in range(ranks):
        modules: dict[int, dict[str, torch.Tensor]] = {}
        for key, (name, how) in _OUTSIDE.items():
            number = {"word_embeddings.weight": 0, "final_linear.weight": layers + 4}.get(key, layers + 3)
            modules.setdefault(number, {})[key] = _share(tensors[name], how, rank, ranks)
        for layer in range(layers):
            for key, (end, how) in block.items():
                tensor = tensors[f"gpt_neox.layers.{layer}.{end}"]
                modules.setdefault(layer + 2, {})[key] = _share(tensor, how, rank, ranks)
        if per_layer:
            for number, content in modules.items():
                torch.save(content, Path(folder) / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        else:
            flat = {f"sequential.{number}.{key}": t for number, part in modules.items() for key, t in part.items()}
            client = {"module": flat, "args": {"a": 1}, "iteration": 3, "np_rng_state": np.random.get_state()}
            torch.save(client, Path(folder) / f"mp_rank_{rank:02d}_model_states.pt")


def _share(tensor: torch.Tensor, how: str, rank: int, ranks: int) -> torch.Tensor:
    if how in ("rows", "columns"):
        return tensor.chunk(ranks, 0 if how == "rows" else 1)[rank].clone()
    return (tensor / ranks).clone() if how == "sum" else tensor.clone()
