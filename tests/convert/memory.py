"""The memory that a conversion takes, in a process of its own, of random weights."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacpt.checkpoint.block_writer import write_pieces
from megacpt.checkpoint.pieces import Piece
from megacpt.checkpoint.store import Store
from megacpt.config import RunConfig, dump
from megacpt.continuation.boundary import RUN, first_ledger
from megacpt.continuation.ledger import LEDGER
from megacpt.convert.families import LLAMA, llama_config
from megacpt.convert.safetensors_writer import Planned, new_folder
from megacpt.convert.weights import piece_of
from megacpt.runtime.layout import start_process_group
from tests.convert.export_cases import OPERATIONS
from tests.pool import PRELOAD
from tests.small import run_mapping

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def random_checkpoint(folder: Path, stream: str, model: dict[str, Any]) -> Path:
    """Write a checkpoint of random weights, layer by layer; the process group is there."""
    config = RunConfig.model_validate(run_mapping(folder, {"english": stream}, model=model))
    network = config.model
    rows = network.padded_vocab()
    pieces = [piece_of(source, network.layers) for source in LLAMA.sources(network, rows, rows)]
    draw = torch.Generator().manual_seed(0)

    def make(piece: Piece) -> Tensor:
        return torch.empty(piece.sizes).normal_(0, 0.02, generator=draw)

    files = {LEDGER: first_ledger(config, None).to_json(), RUN: dump(config)}
    return Store(folder).publish(0, lambda where: write_pieces(where, pieces, make), files)


def random_hf(folder: Path, stream: str, model: dict[str, Any]) -> Path:
    """Write a Llama of Hugging Face of random weights in bfloat16, tensor by tensor."""
    network = RunConfig.model_validate(run_mapping(folder, {"english": stream}, model=model)).model
    rows = network.padded_vocab()
    plan = [
        Planned(target.name, torch.bfloat16, target.shape)
        for source in LLAMA.sources(network, rows, rows)
        for target in source.targets
    ]
    draw = torch.Generator().manual_seed(0)
    texts = {"config.json": json.dumps(llama_config(network, rows, 256, "bfloat16"))}
    with new_folder(folder, plan, texts, {}) as made:
        for one in plan:
            made.write(one.name, torch.empty(one.shape).normal_(0, 0.02, generator=draw))
    return folder


def peak_of(folder: Path, stream: str, model: dict[str, Any], operation: str) -> tuple[int, int]:
    """Return the bytes of memory that an export takes beyond those of the process, and those of the checkpoint."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, folder, stream, model, operation))
    process.start()
    theirs.close()
    try:
        found: tuple[int, int] = ours.recv()
    finally:
        process.join(60)
    return found


def _measure(pipe: Connection, folder: Path, stream: str, model: dict[str, Any], operation: str) -> None:
    torch.set_num_threads(1)
    # Blocks beyond a megabyte go back at once when they are freed, as those of large models do (above 32 MB, always).
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    start_process_group()
    source = random_hf if operation == "from_hf" else random_checkpoint
    options = {"tokenizer": "bytes"} if operation == "from_hf" else {}
    checkpoint = source(folder / "run", stream, model)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    # A first export of little imports what it needs, and takes what stays taken.
    little = {**model, "layers": 1, "vocab_size": 300, "hidden": 256, "ffn": 256}
    OPERATIONS[operation](source(folder / "little", stream, little), folder / "first", **options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    OPERATIONS[operation](checkpoint, folder / "out", **options)
    pipe.send((_status("VmHWM") - before, size))


def _status(key: str) -> int:
    """A line of what Linux says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(found) * 1024
