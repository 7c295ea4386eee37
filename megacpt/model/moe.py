"""The layer of experts in the place of an MLP: Megatron's `MoELayer` with megacpt's router, experts and local dispatch.

Where all experts are on the rank, tokens are sorted, computed and combined here. With expert parallelism Megatron's
all-to-all dispatcher takes them to the ranks of their experts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megacpt.model.activation import Activation
from megacpt.model.experts import Experts
from megacpt.model.quantised import expert_matrices, linear_layers
from megacpt.model.router import Router
from megacpt.ops.expert_order import combine_tokens, gather_tokens, moe_sort

if TYPE_CHECKING:
    from megacpt.config.model import ModelConfig
    from megacpt.config.moe import MoEConfig
    from megacpt.config.quantise import CacheForm


class LocalDispatcher(MoETokenDispatcher):
    """Sorts tokens by expert and combines what comes back; all experts are on this rank.

    Between its calls Megatron's layer hands on a `Choice` as it came from the router: gates in the place of the
    probabilities, experts in that of the routing map.

    Args:
        replaced: the dispatcher that Megatron's layer has made.
        experts: E.
    """

    def __init__(self, replaced: MoETokenDispatcher, experts: int) -> None:
        self.__dict__.update(vars(replaced))  # settings and groups, which the layer may look at
        self.experts = experts

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Copy each token [s, b, h] once for each of its experts, sorted by expert: [N, h]."""
        self.shape = tokens.shape
        self.gates = probs
        self.order = moe_sort(routing_map, self.experts)
        return gather_tokens(tokens.flatten(0, 1), self.order), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing has to move."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, None]:
        """The rows, how many each expert has, and no weights: they are applied when rows are combined."""
        del probs
        return hidden_states, self.order.counts, None

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing has to be sorted back."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Nothing has to move."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the results of each token's experts, weighted by its gates: [s, b, h]."""
        out = combine_tokens(hidden_states, self.order, self.gates)
        del self.order, self.gates
        return out.view(self.shape)


def dispatch_locally(model: nn.Module) -> None:
    """Let the layers of experts of a model sort and combine tokens here; all experts must be on this rank."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.token_dispatcher = LocalDispatcher(layer.token_dispatcher, layer.num_local_experts)


def expert_layer_spec(model: ModelConfig, moe: MoEConfig, expert_parallel: int, cache: CacheForm) -> ModuleSpec:
    """The spec of a layer of experts.

    Args:
        model: the network.
        moe: its experts.
        expert_parallel: ranks that share them.
        cache: how quantised weights are kept.
    """
    first, second = linear_layers(model, "mlp", cache)
    shared = MLPSubmodules(linear_fc1=first, activation_func=Activation, linear_fc2=second)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=Experts, params=expert_matrices(model, cache)),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
            router=partial(Router, moe=moe, dense=expert_parallel > 1),
        ),
    )
