"""One optimizer step under a parallel layout: the protocol and its implementation on Megatron Core."""

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
