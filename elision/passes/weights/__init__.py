"""Weights of fewer bits, and activations in bytes.

Kernels decode weights in registers: what is saved are the bytes that a step reads, and with `a8` the time of products. See
"Calibrating" in `elision/passes/README.md`."""
