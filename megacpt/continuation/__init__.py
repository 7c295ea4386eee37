"""The lineage: what a checkpoint has seen, how a stage begins, what may change at a boundary."""
