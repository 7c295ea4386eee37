"""The smaller sections of a run: optimizer, batch, layout, checkpoints, evaluation, log."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megacpt.config.base import Count, Interval, LocalPath, Number, Section, StreamName
from megacpt.config.carry import FrozenPart
from megacpt.config.multipliers import Multipliers
from megacpt.config.quantities import Duration, Rate, Tokens


class OptimConfig(Section):
    """The optimizer and its hyperparameters."""

    optimizer: Literal["adamw", "lion"] = Field(
        default="adamw",
        description="adamw: Adam with decoupled weight decay (Loshchilov and Hutter 2019). lion: the sign of a running "
        "mean (Chen et al. 2023), with one moment instead of two; it wants a peak_lr 3 to 10 times smaller, a "
        "weight_decay as many times larger, and a beta2 such as 0.99. A stage may change it: the mean of the gradient "
        "goes on (see stage.carry).",
        examples=["adamw"],
    )
    peak_lr: Number = Field(
        gt=0,
        description="Highest learning rate of the schedule; rates given as percentages are percentages of "
        "it. Larger models want smaller rates: 3e-4 at 400M parameters, 1.2e-4 at 10B (Ibrahim et al. "
        "2024).",
        examples=[3e-4],
    )
    peak_decay: Number = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on peak_lr for each trunk stage of the lineage after the first: the peak of stage k, "
        "counted from 0, is `peak_lr * peak_decay**k`. Below 1 a new stage begins its schedule anew. Not used with "
        "`peaks`.",
        examples=[0.7],
    )
    peaks: list[Rate] | None = Field(
        default=None,
        min_length=1,
        description="Peak rate of each trunk stage of the lineage, the first stage first: absolute, or percentages of "
        "peak_lr. null: peak_lr, with peak_decay.",
        examples=["[100%, 50%, 50%]"],
    )
    weight_decay: Number = Field(
        default=0.1,
        ge=0,
        description="Decoupled weight decay: each step shrinks a weight by `rate * weight_decay` of itself. "
        "Norms and biases are left alone.",
        examples=[0.1],
    )
    multipliers: Multipliers = Field(
        default_factory=Multipliers, description="Factors on learning rate and weight decay for parts of the model."
    )
    freeze: list[FrozenPart] = Field(
        default_factory=list,
        description="Parts that the stage leaves as they are, to the last bit: embeddings, output, norms, attention, "
        "mlp (shared experts too), router, experts, or layers counted from the input, as layers:3 or layers:1-4. They "
        "have no gradient and no optimizer state; a later stage that trains them again begins with a new state for "
        "them.",
        examples=["[embeddings, layers:1-4]"],
    )
    beta1: Number = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Decay of Adam's running mean of the gradient, per step. For lion the weight of its mean against "
        "the gradient of the step.",
        examples=[0.9],
    )
    beta2: Number = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="Decay of Adam's running mean of the squared gradient, per step. For lion that of its mean of the "
        "gradient.",
        examples=[0.95],
    )
    eps: Number = Field(
        default=1e-8,
        gt=0,
        description="Small number added to the root of Adam's second moment, against division by zero. Lion has no use "
        "for it.",
        examples=[1e-8],
    )
    clip: Number | None = Field(
        default=1.0,
        gt=0,
        description="Gradients are scaled down where their global L2 norm exceeds this. null: no clipping.",
        examples=[1.0],
    )


class BatchConfig(Section):
    """How many tokens an optimizer step sees."""

    sequences: Count = Field(
        ge=1,
        description="Sequences in one optimizer step, over all ranks: the global batch. One step sees "
        "`sequences * seq_length` tokens. It must be a multiple of `microbatch` times the data-parallel "
        "size.",
        examples=[32, 1024],
    )
    seq_length: Count = Field(
        ge=1,
        description="Tokens in one sequence; at most `model.max_seq_length`.",
        examples=[256, 2048],
    )
    microbatch: Count = Field(
        default=1,
        ge=1,
        description="Sequences that one rank pushes through the model at once. It decides memory and speed, "
        "never the result: gradients are accumulated until the step is complete.",
        examples=[4],
    )


class ParallelConfig(Section):
    """How model and batch are spread over ranks; what remains of the world size is data parallelism."""

    tensor: Count = Field(
        default=1,
        ge=1,
        description="Tensor-parallel size: ranks that share each matrix. It must divide the attention "
        "heads, the MLP width and the padded vocabulary.",
        examples=[2],
    )
    pipeline: Count = Field(
        default=1,
        ge=1,
        description="Pipeline-parallel size: groups of layers on different ranks. It must divide the layers.",
        examples=[2],
    )
    virtual_pipeline: Count = Field(
        default=1,
        ge=1,
        description="Interleaved pipelining: how many groups of layers each pipeline rank holds. Above 1 it "
        "shrinks the pipeline bubble for more communication; it needs `pipeline` above 1 and a number of "
        "microbatches a rank that `pipeline` divides. `pipeline * virtual_pipeline` must divide the layers.",
        examples=[2],
    )
    context: Count = Field(
        default=1,
        ge=1,
        description="Context-parallel size: ranks that share each sequence. `2 * context` must divide "
        "`batch.seq_length`.",
        examples=[2],
    )
    expert: Count = Field(
        default=1,
        ge=1,
        description="Expert-parallel size: ranks that share the experts of a layer, out of those that tensor, context "
        "and data parallelism make. It must divide `model.moe.experts` and the ranks of a pipeline stage. Experts are "
        "whole on a rank, also with `tensor` above 1.",
        examples=[2],
    )
    sequence: bool = Field(
        default=False,
        description="Sequence parallelism: norms and residuals are split along the sequence among the "
        "tensor-parallel ranks. Saves activation memory; needs `tensor` above 1. A model with experts needs it where "
        "`tensor` is above 1.",
        examples=[True],
    )
    distributed_optimizer: bool = Field(
        default=False,
        description="Split the optimizer state over the data-parallel ranks (ZeRO-1). Same numbers, less memory.",
        examples=[True],
    )
    gather: Literal["full", "2bit"] = Field(
        default="full",
        description="What data-parallel ranks send each other after a step of the distributed optimizer: full: all "
        "weights, in the precision of the run; 2bit: of ternary matrices codes of two bits, an eighth of bfloat16, and "
        "only the others in full. Same numbers. It needs `distributed_optimizer` and the grid ternary.",
        examples=["2bit"],
    )


class CheckpointConfig(Section):
    """When the run is saved, and which checkpoints stay."""

    every: Interval = Field(
        default=Duration.parse("500 steps"),
        description="Save a checkpoint each time this much is done: steps, tokens, or a percentage of the "
        "stage. The end of the stage is always saved.",
        examples=["500 steps", "10%"],
    )
    keep_last: Count | None = Field(
        default=2,
        ge=1,
        description="Keep this many of the newest checkpoints. null: keep all.",
        examples=[2],
    )
    keep_every: Interval | None = Field(
        default=None,
        description="Keep for good one checkpoint each time this much is done, on top of the newest. null: none.",
        examples=["5000 steps"],
    )
    keep_best: Count | None = Field(
        default=None,
        ge=1,
        description="Keep this many checkpoints with the lowest mean evaluation loss, on top of the newest. "
        "null: none.",
        examples=[1],
    )
    asynchronous: bool = Field(
        default=False,
        description="Write in the background while training goes on; costs host memory for one copy of the state.",
        examples=[True],
    )


class EvaluateConfig(Section):
    """Loss on held-out streams during training."""

    every: Interval = Field(
        default=Duration.parse("200 steps"),
        description="Evaluate each time this much is done: steps, tokens, or a percentage of the stage; "
        "also at the start and the end of the stage.",
        examples=["200 steps"],
    )
    dense: Interval | None = Field(
        default=Duration.parse("512 steps"),
        description="In a stage that continues a checkpoint, also evaluate after steps 1, 2, 4, 8 and so on up to this "
        "point: what is forgotten after a boundary is often forgotten, and learned again, within few steps. null: only "
        "`every`.",
        examples=["512 steps"],
    )
    tokens: Tokens = Field(
        default=Tokens.parse("100k"),
        description="How many tokens of each stream are evaluated, from its start; the whole stream where "
        "it is shorter.",
        examples=["100k"],
    )
    seq_length: Count | None = Field(
        default=None,
        ge=1,
        description="Tokens that the model sees at once when it is evaluated; null: batch.seq_length. Losses fall with "
        "longer sequences, so give one length for the whole lineage where a stage changes batch.seq_length and its "
        "losses are compared with those before.",
        examples=[2048],
    )
    routing: Tokens | None = Field(
        default=Tokens.parse("8k"),
        description="In a model with experts, how many tokens of each stream are looked at to measure where they are "
        "routed: the load of the experts, and how many choices are still those of the start of the stage. null: none.",
        examples=["16k"],
    )
    streams: dict[StreamName, LocalPath] = Field(
        default_factory=dict,
        description="Held-out streams by name, each with its folder, relative to where the command is run. "
        "A stage file adds to those of the run it continues (so that forgetting is seen); `NAME: null` "
        "there drops one.",
        examples=["{english: data/english-valid}"],
    )


class LogConfig(Section):
    """What is written while training."""

    every: Interval = Field(
        default=Duration.parse("10 steps"),
        description="Write a line of metrics (loss, rate, gradient norm, tokens per second) each time this "
        "much is done: steps, tokens, or a percentage of the stage.",
        examples=["10 steps"],
    )
    tensorboard: bool = Field(
        default=True,
        description="Also write the metrics for TensorBoard, to RUN/tensorboard.",
        examples=[False],
    )
