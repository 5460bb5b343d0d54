"""A pass of one's own in thirty lines (docs/write_a_pass.md explains it): every n-th layer loses its MLP.

python examples/write_a_pass.py [MODEL] [--every 10]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import elision
from elision.ir.program import Program
from elision.passes.base import Pass, register


@register
@dataclass(frozen=True)
class Thin(Pass):
    """Every ``every``-th layer loses its MLP: the residual stream passes by it. Identity setting: more than there are layers."""

    every: int = 10

    name: ClassVar[str] = "thin"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"
    quality: ClassVar[str] = "approximate"

    def apply(self, program: Program) -> None:
        if self.every < 2:
            raise elision.BadInput(f"thin: every={self.every}; expected at least 2, so that some MLPs stay")
        for index in list(program.layers)[self.every - 1 :: self.every]:
            program.layers[index].bypass("mlp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    for passes in ([], [f"thin:every={args.every}"], [f"thin:every={args.every}", "int8"]):
        model = elision.compile(args.model, passes=passes)
        text = model.generate("The three primary colours are", max_new_tokens=16, temperature=0)
        print(f"{' '.join(passes) or 'as it is'}: {model.report['weight_bytes'] / 1e6:.2f} MB of weights, {text!r}")


if __name__ == "__main__":
    main()
