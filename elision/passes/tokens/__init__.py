"""Tokens that are left out or merged: of an encoder's input, of a prompt from some layer on, or of a prompt before it is read.

See "Fewer tokens" in `elision/passes/README.md`."""
