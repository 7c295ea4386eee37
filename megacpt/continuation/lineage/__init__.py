"""The lineage on disk: the forest of runs, drawn, compared, proven and exported."""
