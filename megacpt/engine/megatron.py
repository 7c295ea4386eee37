"""The Megatron Core engine: TP, SP, PP (1F1B and interleaved), CP, EP, DP and the distributed optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megacpt.engine.code_gather import CodeGather, GradientsOnly
from megacpt.engine.optimizer_state import OptimizerState
from megacpt.engine.plug_in import megatron_optimizer
from megacpt.engine.predictions import predict
from megacpt.engine.protocol import Batch, Choices, Predictions, StepReport
from megacpt.engine.quantisers import Quantisers
from megacpt.engine.routing import choices, load_statistics, routers_of, whole_model
from megacpt.model.attention import context_slice
from megacpt.model.builder import build_model, transformer_config
from megacpt.model.init import initialise
from megacpt.model.load import end_step
from megacpt.optim.freeze import Frozen, freeze
from megacpt.optim.groups import group_overrides
from megacpt.optim.moments import Carry
from megacpt.runtime.device import local_device, on_cuda
from megacpt.runtime.layout import Layout, enter_layout, world_size

if TYPE_CHECKING:
    from megacpt.config import RunConfig


class MegatronEngine:
    """Model, optimizer and gradient reduction of one rank.

    Args:
        config: the run.
        vocab_size: ids of the tokenizer.
        train: with False there is no optimizer and no gradient buffer (evaluation, generation).

    Raises:
        LayoutError: if the layout does not fit the number of ranks.
    """

    def __init__(self, config: RunConfig, vocab_size: int, train: bool = True) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.layout = Layout.of(config.parallel, world_size())
        enter_layout(self.layout, config.seed)
        self.device = local_device()
        self.transformer = transformer_config(config.model, self.layout, config.precision, config.recompute)
        padded_vocab = config.model.padded_vocab(vocab_size)
        self.chunks = build_model(config.model, self.transformer, padded_vocab, self.layout, config.quantised_cache)
        for chunk in self.chunks:
            chunk.to(self.device)
        self.routers = routers_of(self.chunks)
        for router in self.routers:
            router.load.reset(self.device)
        self.moe_layers = [number for number, moe in enumerate(config.model.moe_layers, 1) if moe]
        initialise(self.chunks, config.model.init_std, config.seed)
        self.quantisers = Quantisers(self.chunks, config.model, self.device)
        self.schedule = get_forward_backward_func()
        self.optimizer: Any = None
        self.code_gather: CodeGather | None = None
        self.wrapped: list[Any] = list(self.chunks)
        self.frozen: Frozen = {}
        if train:
            self._freeze()
            self._prepare_training()
        self.optimizer_state = OptimizerState(self.chunks, self.optimizer, self.frozen)

    def _freeze(self) -> None:
        """Take the parts that the stage does not train out of training."""
        self.frozen = freeze(self.chunks, self.config.optim.freeze, self.config.model.tied_embeddings)
        if self.frozen and self.config.recompute == "full":
            # Megatron's recomputed layers have gradients only where their input has one.
            for chunk in self.chunks:
                if chunk.pre_process:
                    chunk.embedding.register_forward_hook(_require_gradient)

    def _prepare_training(self) -> None:
        """Wrap the chunks for gradient reduction and build the optimizer."""
        overlap = on_cuda()
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            use_distributed_optimizer=self.layout.distributed_optimizer,
        )
        coded = self.config.parallel.gather == "2bit"
        wrapper = GradientsOnly if coded else DistributedDataParallel
        self.wrapped = [
            wrapper(self.transformer, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(self.chunks)
        ]
        self.transformer.finalize_model_grads_func = finalize_model_grads
        if overlap:
            one = len(self.wrapped) == 1
            no_sync = [chunk.no_sync for chunk in self.wrapped]
            start = [chunk.start_grad_sync for chunk in self.wrapped]
            self.transformer.no_sync_func = no_sync[0] if one else no_sync
            self.transformer.grad_sync_func = None if one else start
        optim = self.config.optim
        settings = OptimizerConfig(
            optimizer="adam",  # Megatron's word for whatever `megatron_optimizer` puts there
            lr=0.0,  # rate and decay are set at every step
            weight_decay=1.0,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip or 0.0,
            bf16=self.config.precision == "bfloat16",
            params_dtype=self.transformer.params_dtype,
            use_distributed_optimizer=self.layout.distributed_optimizer,
        )
        groups = group_overrides(self.chunks, optim.multipliers, self.config.model.tied_embeddings)
        self.optimizer = megatron_optimizer(optim.optimizer, settings, self.wrapped, groups)
        if coded:
            self.code_gather = CodeGather(self.wrapped, self.quantisers.all)
            self.quantisers.gathered = frozenset(map(id, self.code_gather.quantisers))

    @property
    def data_rank(self) -> int:
        """This rank's place on the data axis."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_size(self) -> int:
        """The number of data-parallel ranks."""
        return self.layout.data

    @property
    def microbatch_multiple(self) -> int:
        """Interleaved pipelines want a multiple of the pipeline's length."""
        return self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1

    def train_step(self, batches: Sequence[Batch], rate: float, weight_decay: float) -> StepReport:
        """See `protocol.Engine.train_step`."""
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, tokens = self._run(batches, forward_only=False)
        grad_norm, skipped = self._update(rate, weight_decay)
        statistics = {**self._end_step(learn=not skipped), **self.quantisers.end_step(updated=not skipped)}
        return StepReport(loss / max(tokens, 1), tokens, grad_norm, skipped, statistics)

    def _end_step(self, learn: bool) -> dict[str, float]:
        """Let the routers learn from the step; return what there is to say of their load."""
        if not self.moe_layers:
            return {}
        loads = end_step(self.routers, learn)
        return load_statistics(whole_model(loads, self.moe_layers, self.device))

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """See `protocol.Engine.evaluate`; nothing of the training state changes."""
        for chunk in self.wrapped:
            chunk.eval()
        with torch.no_grad():
            return self._run(batches, forward_only=True)

    def predict(self, batches: Sequence[Batch]) -> Predictions:
        """See `protocol.Engine.predict`; nothing of the training state changes."""
        return predict(self, batches)

    def choices(self, batches: Sequence[Batch]) -> Choices | None:
        """See `protocol.Engine.choices`; nothing of the training state changes."""
        return choices(self, batches)

    def state(self) -> dict[str, Any]:
        """See `protocol.Engine.state`."""
        return self.optimizer_state.sharded()

    def load(self, state: dict[str, Any]) -> None:
        """See `protocol.Engine.load`."""
        self.optimizer_state.take(state)
        self.quantisers.forget()

    def carry(self, carries: dict[str, Carry]) -> None:
        """See `protocol.Engine.carry`."""
        for part in self.optimizer_state.parts:
            part.optimizer.carry(carries)

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> tuple[float, int]:
        """Run the pipeline schedule over the microbatches; return the global loss sum and token count."""
        microbatch, length = batches[0].tokens.shape
        reports: list[dict[str, Tensor]] = self.schedule(
            forward_step_func=self._forward,
            data_iterator=[iter(batches) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=length - 1,
            micro_batch_size=microbatch,
            forward_only=forward_only,
        )
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for report in reports:  # empty except on the last pipeline stage
            totals[0] += report["loss"]
            totals[1] += report["tokens"]
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
        return float(totals[0]), int(totals[1])

    def _forward(self, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        """Megatron's forward step: one microbatch through one chunk, and the function that makes its loss."""
        batch = next(batches)
        tokens = torch.from_numpy(batch.tokens).to(self.device, non_blocking=True)
        valid = torch.ones_like(tokens[:, 1:], dtype=torch.float32)
        if batch.valid is not None:
            valid = torch.from_numpy(batch.valid).to(self.device, torch.float32)
        rank, size = parallel_state.get_context_parallel_rank(), self.layout.context
        inputs, labels, valid = (context_slice(x, 1, rank, size) for x in (tokens[:, :-1], tokens[:, 1:], valid))
        output = model(input_ids=inputs, position_ids=None, attention_mask=None, labels=labels)
        return output, partial(_loss, valid)

    def _update(self, rate: float, weight_decay: float) -> tuple[float, bool]:
        """Clip and step, unless the gradient is not finite; return its norm and whether the step was skipped."""
        optimizer = self.optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            return grad_norm, True
        clip = self.config.optim.clip or 0.0
        parameters = [p for part in optimizer.chained_optimizers for p in part.get_parameters()]
        if clip > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]
            group["weight_decay"] = weight_decay * group["wd_mult"]
        optimizer.step_with_ready_grads()
        if self.code_gather is not None:
            self.code_gather.run()
        return grad_norm, False


def _require_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    """Let what comes out of a frozen module have a gradient, so that those behind it get theirs."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _loss(valid: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of the valid tokens; Megatron divides the gradient by their global number."""
    loss = (output * valid).sum()
    tokens = valid.sum().to(torch.int)
    return loss, tokens, {"loss": loss.detach().double(), "tokens": tokens}
