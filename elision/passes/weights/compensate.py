"""Rounding with error compensation: what rounding an input's weights does to the output, the inputs after it make good."""

from __future__ import annotations

import torch

from elision.errors import BadInput
from elision.ir import integers
from elision.ir.weights import Int4, Int8

#: Inputs that are rounded before their errors reach those after them: the products stay large.
BLOCK = 128


def hessian(x: torch.Tensor) -> torch.Tensor:
    """``2 X^T X f32[k, k]`` of inputs ``x [.., k]``: the second derivative of ``|x (w - q)|^2`` by a row's weights."""
    rows = x.reshape(-1, x.shape[-1]).float()
    found: torch.Tensor = 2 * (rows.T @ rows)
    return found


def factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper ``U f32[k, k]`` with ``U^T U = (H + damp * mean(diag H) I)^-1``: row i, from i on, is the i-th row of the inverse
    of what is left of H once the inputs before i are fixed, divided by the root of its first number (Frantar et al. 2022,
    section 3.3, step 3). Inputs that were never seen weigh as if apart from the others."""
    wide = hessian.double()
    level = float(wide.diagonal().mean())
    wide = wide + torch.eye(len(wide), dtype=wide.dtype) * (damp * level if level > 0 else 1.0)
    # H = R R^T with R upper is the Cholesky of H in reverse order, and (R R^T)^-1 = (R^-1)^T R^-1.
    lower, failed = torch.linalg.cholesky_ex(wide.flip(0, 1))
    if int(failed) or not bool(lower.isfinite().all()):
        raise BadInput(f"gptq: inputs are not finite, or too few for damp={damp}; expected a larger damp or more text")
    unit = torch.eye(len(wide), dtype=wide.dtype)
    found: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
    return found.float()


def compensated(weight: torch.Tensor, upper: torch.Tensor, encoding: Int4 | Int8) -> torch.Tensor:
    """Stored rows ``u8[n, row bytes]`` of ``weight [n, k]``, rounded input by input (GPTQ, Frantar et al. 2022, algorithm 1) with
    `factor`'s ``upper``. A group has the numbers that ``encoding`` gives its weights as they are when the group is reached.
    Weights that it can hold already come back as they were."""
    count, width = weight.shape
    size = encoding.block(width).elements
    step = max(1, BLOCK // size) * size
    left = weight.float().T.contiguous()  # [k, n]: an input's weights are a row
    codes, groups = torch.empty_like(left), []
    for start in range(0, width, step):
        stop = min(start + step, width)
        part, fixed = left[start:stop], upper[start:stop]
        errors = torch.empty_like(part)
        for i in range(stop - start):
            if i % size == 0:
                scale, minimum = _numbers(part[i : i + size].T, encoding)
                groups.append((scale, minimum))
            q = integers.nearest(part[i] - minimum, scale)
            q = q.clamp_(0, 15) if isinstance(encoding, Int4) else q.clamp_(-127, 127)
            codes[start + i] = q
            errors[i] = (part[i] - (q * scale + minimum)) / fixed[i, start + i]
            part[i + 1 :].addr_(fixed[i, start + i + 1 : stop], errors[i], alpha=-1)
        left[stop:].addmm_(fixed[:, stop:].T, errors, alpha=-1)
    runs = codes.T.reshape(count, -1, size)
    blocks = [_packed(runs[:, g], *numbers, encoding) for g, numbers in enumerate(groups)]
    return torch.cat(blocks, 1)


def _numbers(group: torch.Tensor, encoding: Int4 | Int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum ``f32[n]`` with which the encoding stores a group ``[n, size]``."""
    blocks = encoding.encode(group.contiguous())
    scale = blocks[:, 0:2].contiguous().view(torch.float16).float()[:, 0]
    if isinstance(encoding, Int8):
        return scale, torch.zeros_like(scale)
    return scale, blocks[:, 2:4].contiguous().view(torch.float16).float()[:, 0]


def _packed(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, encoding: Int4 | Int8) -> torch.Tensor:
    if isinstance(encoding, Int8):
        return integers.pack_int8(scale[:, None], codes)
    return integers.pack_int4(scale[:, None], minimum[:, None], codes)
