"""Fused operations: one face for every device, a torch reference that defines each, and native kernels where built."""
