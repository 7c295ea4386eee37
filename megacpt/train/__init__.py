"""The train loop, and the callbacks that do everything else."""
