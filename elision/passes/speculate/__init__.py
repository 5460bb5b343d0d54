"""Drafts that one step verifies together: more tokens from a step, and the same output.

Drafts come from tables, or from a model. A policy runs as many drafted tokens as pay on this machine, or none. See "Tables that
draft" and "Models that draft" in `elision/passes/README.md`."""
