"""Mixture of experts: which layers have experts, how tokens choose them, and how they are kept in balance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megacpt.config.base import Count, Number, Problem, Section, raise_problems


class PenaltyBalance(Section):
    """A loss on the routing probabilities (Fedus et al. 2021, eq. 4; with the z-loss: PBTk of Therien et al. 2025)."""

    kind: Literal["penalty"] = Field(
        description="A loss that grows where experts with many tokens also have high probabilities.",
    )
    strength: Number = Field(
        default=0.01,
        ge=0,
        description="Weight of the loss. At perfectly even routing the loss equals this number, whatever the number of "
        "experts and of choices.",
        examples=[0.01],
    )
    scope: Literal["sequence", "microbatch", "data", "step"] = Field(
        default="step",
        description="Which tokens' choices are counted to say how busy an expert is: those of the sequence, of the "
        "microbatch, of the microbatches that all data-parallel ranks process at once, or of the whole last optimizer "
        "step. Wide scopes let experts specialise by domain (Qiu et al. 2025); `step` costs least and is the same for "
        "any microbatch and any number of ranks.",
        examples=["step"],
    )


class SinkhornBalance(Section):
    """Tokens are assigned evenly in training, by Sinkhorn's algorithm; the best experts at evaluation (SBTk)."""

    kind: Literal["sinkhorn"] = Field(
        description="In training, choices are made under a bias that gives every expert the same load.",
    )
    scope: Literal["rank", "data", "step"] = Field(
        default="data",
        description="Which tokens are balanced together: those of the rank (as Megatron Core does; it depends on the "
        "layout), those of the microbatches that all data-parallel ranks process at once, or those of an optimizer "
        "step: then the bias stays through a step and is improved by one iteration after it.",
        examples=["data"],
    )
    rule: Literal["scale_free", "megatron", "neox3"] = Field(
        default="scale_free",
        description="How the iteration is done: scale_free stops when the loads are within `tolerance` of even; "
        "megatron and neox3 are those of Megatron Core and GPT-NeoX, for comparison, with `scope: rank`.",
        examples=["scale_free"],
    )
    iterations: Count = Field(
        default=8, ge=1, description="Iterations are never more than this, balanced or not.", examples=[8]
    )
    tolerance: Number = Field(
        default=0.01,
        gt=0,
        description="Mean relative distance from the even load at which the iteration stops.",
        examples=[0.01],
    )
    warm_start: bool = Field(
        default=True,
        description="Begin with the bias of the last step, which is kept in the checkpoint, instead of with none. Only "
        "for `rule: scale_free`.",
        examples=[True],
    )

    @model_validator(mode="after")
    def _foreign_rules(self) -> SinkhornBalance:
        if self.rule != "scale_free":
            problems = []
            if self.scope != "rank":
                problems.append(Problem("scope", f"{self.scope}: `rule: {self.rule}` balances one rank: take rank"))
            if self.warm_start:
                problems.append(Problem("warm_start", f"true: `rule: {self.rule}` starts from scratch: take false"))
            raise_problems(problems)
        return self


class BiasBalance(Section):
    """A bias on the choice that is moved after each step (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3)."""

    kind: Literal["bias"] = Field(
        description="After each step, experts with too many tokens get a lower bias on the choice, others a higher one."
    )
    rate: Number = Field(default=0.001, gt=0, description="By how much each bias moves after a step.", examples=[0.001])
    sequence_strength: Number = Field(
        default=0.0,
        ge=0,
        description="Weight of a loss on the imbalance within each sequence, as that of the kind penalty with the "
        "scope sequence. 0: none.",
        examples=[0.0001],
    )


class NoBalance(Section):
    """Nothing keeps experts in balance."""

    kind: Literal["none"] = Field(description="Nothing keeps the experts in balance; for comparison.")


Balance = Annotated[PenaltyBalance | SinkhornBalance | BiasBalance | NoBalance, Field(discriminator="kind")]


class MoEConfig(Section):
    """Feed-forward layers of experts, of which each token uses a few (Fedus et al. 2021; Dai et al. 2024)."""

    experts: Count = Field(
        ge=1,
        description="Routed experts of a layer. `parallel.expert` must divide it.",
        examples=[8, 31],
    )
    top_k: Count = Field(
        default=1,
        ge=1,
        description="Experts that each token uses: 1 in Switch layers, several in granular ones.",
        examples=[1, 3],
    )
    ffn: Count | None = Field(
        default=None,
        ge=1,
        description="Inner width of one expert. null: model.ffn, as in Switch layers; granular experts are narrower.",
        examples=[704],
    )
    shared_ffn: Count = Field(
        default=0,
        ge=0,
        description="Inner width of the shared experts together, which every token uses beside its own. 0: none.",
        examples=[704],
    )
    every: Count = Field(
        default=1,
        ge=1,
        description="Every how manieth layer has experts, counted from the first one that has; the others are dense.",
        examples=[1, 2],
    )
    first_dense: Count = Field(
        default=0, ge=0, description="This many layers at the input are dense, whatever `every`.", examples=[1]
    )
    score: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="How logits become the weights of experts: softmax over all of them, or the sigmoid of each.",
        examples=["softmax"],
    )
    renormalise: bool = Field(
        default=False,
        description="Divide the weights of a token's experts by their sum (softmax after the choice instead of before "
        "it). With one expert a token the weight would be 1 and the router would learn from the balance loss alone.",
        examples=[True],
    )
    scale: Number = Field(
        default=1.0,
        gt=0,
        description="Factor on the weights of a token's experts; DeepSeek-V3 takes 2.5.",
        examples=[2.5],
    )
    groups: Count = Field(
        default=1,
        ge=1,
        description="Experts are divided into this many equal groups, of which a token may use `groups_kept` "
        "(group-limited routing). It must divide `experts`.",
        examples=[8],
    )
    groups_kept: Count = Field(
        default=1,
        ge=1,
        description="Groups that a token may choose experts from; it must divide `top_k`.",
        examples=[4],
    )
    capacity: Number | None = Field(
        default=None,
        gt=0,
        description="In training, an expert takes at most this many times its even share of a microbatch's tokens, "
        "those with the highest weights first; others are dropped and pass by the layer. null: no limit, nothing is "
        "dropped.",
        examples=[1.25],
    )
    z_loss: Number = Field(
        default=0.001,
        ge=0,
        description="Weight of the loss on the squared log-sum-exp of the router's logits, which keeps them small "
        "(Zoph et al. 2022). 0: none.",
        examples=[0.001],
    )
    balance: Balance = Field(
        default_factory=lambda: PenaltyBalance(kind="penalty"),
        description="What keeps the load of experts even. A stage may change it.",
    )

    @model_validator(mode="after")
    def _numbers_agree(self) -> MoEConfig:
        raise_problems(list(self._number_problems()))
        return self

    def _number_problems(self) -> Iterator[Problem]:
        if self.top_k > self.experts:
            yield Problem("top_k", f"{self.top_k} is more than the {self.experts} experts: take at most that many")
        if self.experts % self.groups:
            yield Problem("groups", f"{self.groups} does not divide experts, which is {self.experts}")
        elif self.groups_kept > self.groups or self.top_k % self.groups_kept:
            text = f"{self.groups_kept} must be at most groups ({self.groups}) and divide top_k ({self.top_k})"
            yield Problem("groups_kept", text)
        elif self.top_k // self.groups_kept > self.experts // self.groups:
            text = f"{self.top_k} from {self.groups_kept} groups is more than the {self.experts // self.groups} of each"
            yield Problem("top_k", text)
        if self.groups > 1 and self.balance.kind == "sinkhorn":
            yield Problem("groups", f"{self.groups}: Sinkhorn's bias balances all experts together: take 1")
        if self.renormalise and self.top_k == 1:
            text = "true leaves a single expert no weight to learn from; it needs top_k above 1: take false"
            yield Problem("renormalise", text)

    def layers(self, count: int) -> list[bool]:
        """Which of `count` layers have experts."""
        return [n >= self.first_dense and (n - self.first_dense) % self.every == 0 for n in range(count)]
