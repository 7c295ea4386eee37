"""Numbers of few bits: blocks that share a scale, grids of levels, rounded activations, packed codes."""
