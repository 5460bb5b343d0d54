"""The form of a cache's rows as a constant of kernels: "" for floats, else "bits.group.axis" of codes (`elision.ir.encoding`),
with "+" if they have minima: "8.128.channel", "2.32.token+"."""

from __future__ import annotations

import triton

from elision.ir.states import Encoding, Int


def form(encoding: Encoding) -> str:
    """The text of an encoding that kernels read."""
    if not isinstance(encoding, Int):
        return ""
    return f"{encoding.bits}.{encoding.group}.{encoding.axis}{'+' if encoding.zero else ''}"


@triton.constexpr_function
def codes(form):
    """Whether rows are codes."""
    return form != ""


@triton.constexpr_function
def bits_of(form):
    return int(form.split(".")[0])


@triton.constexpr_function
def per_byte(form):
    """Codes of a byte; of floats, 1 of an element."""
    return 8 // int(form.split(".")[0]) if form else 1


@triton.constexpr_function
def group_of(form):
    return int(form.split(".")[1])


@triton.constexpr_function
def by_token(form):
    """Whether rows share scales, by channel."""
    return ".token" in form


@triton.constexpr_function
def has_low(form):
    """Whether a group has a minimum beside its scale."""
    return form.endswith("+")


@triton.constexpr_function
def signed(form):
    """Whether codes are signed bytes; others are not negative."""
    return form.startswith("8.") and not form.endswith("+")


@triton.constexpr_function
def beside(form, width):
    """Scales of a row of ``width`` channels, in order; 0 of floats, and where rows share theirs."""
    return width // int(form.split(".")[1]) if ".channel" in form else 0
