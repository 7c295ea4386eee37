"""Where a run happens: device, ranks and process groups, Megatron Core on the CPU, seeds, signals, logging.

Importing this package prepares ``megatron.core`` for import; nothing else in megacpt imports it earlier.
"""

from megacpt.runtime.device import on_cuda
from megacpt.runtime.megatron_cpu import install

install(on_cpu=not on_cuda())
