"""What a person looks at: the curves and tables of a lineage on one page."""

from __future__ import annotations

from megacpt.report.lineage import chain
from megacpt.report.page import write_report
from megacpt.report.record import RunRecord, load_run

__all__ = ["RunRecord", "chain", "load_run", "write_report"]
