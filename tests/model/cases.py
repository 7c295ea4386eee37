"""What the ranks of a pool run: models against plain float64 ones, fresh weights, attention over two ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megacpt.bench.plain import PlainLoop
from megacpt.checkpoint.tensors import load_tensors, save_tensors
from megacpt.engine.protocol import Batch
from megacpt.model.attention import CausalAttention, context_slice
from megacpt.model.init import sharded_parameters
from megacpt.runtime.layout import Layout, enter_layout
from tests.checkpoint.cases import VOCAB, engine

LENGTH = 48


def _rows() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (4, LENGTH + 1))


def _batches() -> list[Batch]:
    return [Batch(part) for part in _rows().reshape(2, 2, LENGTH + 1)]


def _engine(model: dict[str, Any], **changes: Any) -> Any:
    batch = {"sequences": 4, "seq_length": LENGTH, "microbatch": 2}
    return engine(model={"max_seq_length": LENGTH, "init_std": 0.08, **model}, batch=batch, **changes)


def _settled(model: dict[str, Any]) -> Any:
    """An engine whose norms and biases are not ones and zeros any more."""
    made = _engine(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.chunks[0].parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return made


def beside_plain(model: dict[str, Any]) -> dict[str, Any]:
    """Logits, loss and gradient norm of Megatron's model in float32 and of a plain one in float64."""
    made = _settled(model)
    (chunk,) = made.chunks
    plain = PlainLoop(made.config, VOCAB, torch.device("cpu"))
    plain.load(chunk.named_parameters())
    plain.model.double()
    rows = torch.from_numpy(_rows())
    chunk.eval()
    with torch.no_grad():
        logits = chunk(rows[:, :-1], None, None, runtime_gather_output=True)
    report = made.train_step(_batches(), 1e-3, 0.1)
    expected = plain.model(rows[:, :-1])
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    squares = [p.grad.square().sum() for p in plain.model.parameters() if p.grad is not None]
    return {
        "logits": (logits.double().numpy(), expected.detach().numpy()),
        "loss": (report.loss, float(loss.detach())),
        "norm": (report.grad_norm, float(torch.stack(squares).sum().sqrt())),
        "parameters": (sum(p.numel() for p in chunk.parameters()), made.config.model.parameters(VOCAB)),
    }


def in_precision(precision: str, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of some steps."""
    made = _engine({}, precision=precision)
    reports = [made.train_step(_batches(), 1e-2, 0.1) for _ in range(steps)]
    return [(report.loss, report.grad_norm) for report in reports]


def fresh(save: str | None = None, load: str | None = None, **changes: Any) -> dict[str, np.ndarray]:
    """The weights of a new model by the names of the global tensors; or of one that is loaded."""
    made = engine(**changes)
    if save:
        save_tensors(made.state(), Path(save))
    if load:
        made.load(load_tensors(made.state(), Path(load)))
    found: dict[str, np.ndarray] = {}
    for part in sharded_parameters(made.chunks):
        place = "/".join(str(i) for i in part.global_offset)
        found[f"{part.key} {place}"] = part.data.detach().float().numpy().copy()
    return found


def attend_over_ranks(length: int, heads: int, groups: int, dim: int, window: int | None) -> dict[str, np.ndarray]:
    """Context-parallel attention and its gradient, each rank with its chunks; what this rank finds."""
    size = torch.distributed.get_world_size()
    enter_layout(Layout(context=size), seed=1)
    rank = parallel_state.get_context_parallel_rank()
    draw = torch.Generator().manual_seed(4)
    whole = [
        torch.randn(length, 2, n, dim, generator=draw, dtype=torch.float64) for n in (heads, groups, groups, heads)
    ]
    query, key, value, direction = (context_slice(x, 0, rank, size).clone() for x in whole)
    for x in (query, key, value):
        x.requires_grad_()
    window_size = None if window is None else (window - 1, 0)
    config: Any = SimpleNamespace(window_size=window_size, attention_dropout=0.0, kv_channels=dim)
    unused: Any = None
    collection = ProcessGroupCollection.use_mpu_process_groups()
    core = CausalAttention(config, 1, unused, "self", pg_collection=collection)
    out = core(query, key, value)
    out.backward(direction.reshape(out.shape))
    found = {"out": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
    return {name: x.numpy().copy() for name, x in found.items() if x is not None}
