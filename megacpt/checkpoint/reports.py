"""How the writers of a checkpoint report what they wrote: each save has a nameless file of its own.

Importing this module puts it in the place of what Megatron Core has: one queue a process, served by a helper process
that takes seconds to start. The writers of a background save that was given up (its run failed, and the process went
on) leave their report there, and the next save takes it for its own: its index then describes another checkpoint's
files. The helper also dies of the SIGTERM with which slurm ends all processes of a job, before the last checkpoint is
written, and outlives a run that is killed.
"""

from __future__ import annotations

import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class Report:
    """What Megatron's writers use of a queue. Writers are forks of this process, and inherit the open file."""

    def __init__(self) -> None:
        # Nobody else can open it, so that what it holds may be unpickled.
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, results: Any) -> None:
        """Write the report."""
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        """Read the report.

        Raises:
            queue.Empty: if the writers ended before it was whole.
        """
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except (EOFError, pickle.UnpicklingError) as error:
            raise queue.Empty from error


# Megatron asks for the queue once for each save.
filesystem_async._get_write_results_queue = Report
