"""The families of models that are read and written, by the ``model_type`` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping

from megacpt.convert.families.bitnet import BITNET
from megacpt.convert.families.deepseek_v3 import DEEPSEEK_V3
from megacpt.convert.families.gpt_neox import GPT_NEOX
from megacpt.convert.families.llama import LLAMA, check_llama, check_names, llama_config
from megacpt.convert.families.mistral import MISTRAL
from megacpt.convert.families.mixtral import MIXTRAL
from megacpt.convert.families.olmo2 import OLMO2
from megacpt.convert.families.qwen2 import QWEN2
from megacpt.convert.families.qwen3 import QWEN3
from megacpt.convert.families.qwen3_moe import QWEN3_MOE
from megacpt.convert.families.table import Family, Source, Target

# In the order in which they are tried for a network that comes from none of them.
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        OLMO2,
        GPT_NEOX,
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK_V3,
        BITNET,
    )
}

__all__ = ["FAMILIES", "LLAMA", "Family", "Source", "Target", "check_llama", "check_names", "llama_config"]
