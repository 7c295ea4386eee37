"""The network, as Megatron Core layer specs."""

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
