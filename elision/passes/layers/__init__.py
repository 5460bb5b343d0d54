"""Layers that are left out: for good, for a prompt, for a step, or for a token.

What is left out takes its weights, its cache and its time with it. See "Less depth" in `elision/passes/README.md`."""
