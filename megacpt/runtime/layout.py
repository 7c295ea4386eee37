"""The parallel layout of a process group: TP x PP x CP x DP, and this rank's place in it."""

from __future__ import annotations

import datetime
import gc
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megacpt.errors import LayoutError
from megacpt.runtime.device import local_device, on_cuda
from megacpt.runtime.megatron_cpu import adapt

if TYPE_CHECKING:
    from megacpt.config import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """How many ranks each mesh axis has; `data` is what remains of the world.

    `expert` is no axis of its own: these ranks are taken out of tensor x context x data, and share the experts.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    distributed_optimizer: bool = False
    expert: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """Derive the layout of `world_size` ranks from the configuration.

        Raises:
            LayoutError: if the world size is no multiple of tensor x pipeline x context.
        """
        model = parallel.tensor * parallel.pipeline * parallel.context
        if world_size % model:
            raise LayoutError(
                f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
                f"= {model} ranks do not divide the {world_size} ranks that were started; "
                f"start a multiple of {model}"
            )
        ranks = world_size // parallel.pipeline
        if ranks % parallel.expert:
            raise LayoutError(
                f"parallel.expert: {parallel.expert} ranks do not divide the {ranks} ranks of a pipeline stage"
            )
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            data=world_size // model,
            sequence=parallel.sequence,
            distributed_optimizer=parallel.distributed_optimizer,
            expert=parallel.expert,
        )

    def __str__(self) -> str:
        parts = [f"tp{self.tensor}", f"pp{self.pipeline}", f"cp{self.context}", f"dp{self.data}"]
        if self.virtual_pipeline > 1:
            parts.insert(2, f"vpp{self.virtual_pipeline}")
        if self.expert > 1:
            parts.append(f"ep{self.expert}")
        return " ".join(parts + ["sp"] * self.sequence + ["distopt"] * self.distributed_optimizer)


_entered: Layout | None = None


def start_process_group() -> None:
    """Join the process group that torchrun describes in the environment, or make one of a single process.

    gloo on the CPU; NCCL with gloo beside it (for host tensors) on GPUs. Safe to call twice.
    """
    if dist.is_initialized():
        return
    device = local_device()
    if on_cuda():
        # Megatron overlaps gradient reduction with computation only if the kernels start in the order of their calls.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_cuda() else "gloo"
    timeout = datetime.timedelta(minutes=30)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def enter_layout(layout: Layout, seed: int) -> None:
    """Build Megatron's process groups for `layout`, leaving another layout first if one is entered.

    The layout that is entered already is kept, so that several engines can live in it.

    Args:
        layout: the layout; its sizes multiply to the world size.
        seed: seeds Megatron's generators; distinct streams for tensor-parallel ranks.
    """
    global _entered
    start_process_group()
    if parallel_state.model_parallel_is_initialized() and layout == _entered:
        model_parallel_cuda_manual_seed(seed)
        return
    leave_layout()
    if not on_cuda():
        adapt()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    _entered = layout
    model_parallel_cuda_manual_seed(seed)


def leave_layout() -> None:
    """Leave Megatron's process groups and end them; the ranks stay connected.

    Megatron only forgets its groups. Each of them has threads and connections of its own, dozens a layout, which a
    process that enters several layouts (stages, tests) would pile up.
    """
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    gc.collect()  # modules of an earlier engine hold groups in reference cycles
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def stop_process_group() -> None:
    """Leave the layout and the process group."""
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's rank, 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, before or after the process group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process is the one that prints and writes what is written once."""
    return rank() == 0
