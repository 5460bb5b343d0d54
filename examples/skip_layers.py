"""Leave layers out of a model: what that saves, and what it costs in perplexity.

python examples/skip_layers.py [MODEL] [--layers 5+17-18] [--half attn|mlp]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch.nn.functional import cross_entropy

import elision

TEXT = """The harbour was quiet in the early morning. A fishing boat came in slowly, its engine a low murmur, and two men threw
ropes to a boy who stood waiting on the stone quay. Behind him the town was waking: a baker opened his shutters, a dog barked,
and the bells of the church rang six times. Plants turn light into chemical energy: chlorophyll in the leaves absorbs sunlight,
and this energy is used to make sugar from water and carbon dioxide. Oxygen is released as a by-product."""


def perplexity(model: elision.Model, text: str) -> float:
    """How surprised the model is by each token of the text, given those before it."""
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode(text)])
    logits = model(input_ids=ids).logits[0]
    return math.exp(cross_entropy(logits[:-1].float(), ids[0, 1:]).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--layers", default="5+17-18", help="layers to leave out, from 0 (default: %(default)s)")
    parser.add_argument("--half", choices=("attn", "mlp"), help="leave out just this half of them")
    parser.add_argument("--prompt", default="The three primary colours are")
    args = parser.parse_args()

    half = f",half={args.half}" if args.half else ""
    pass_text = f"skip-layers:layers={args.layers}{half}"
    models = {"all layers": elision.compile(args.model), pass_text: elision.compile(args.model, passes=[pass_text])}
    texts, speeds, states = {}, dict.fromkeys(models, 0.0), {}
    for _ in range(3):  # in turns, the best of each: other work on the machine only ever slows down
        for name, model in models.items():
            texts[name] = model.generate(args.prompt, max_new_tokens=24, min_new_tokens=24, temperature=0)
            assert model.stats is not None
            speeds[name] = max(speeds[name], model.stats.tokens_per_second)
            states[name] = model.stats.state_bytes
    for name, model in models.items():
        print(
            f"{name}: {len(model.program.layers)} layers, perplexity {perplexity(model, TEXT):.1f}, {speeds[name]:.1f} tokens/s"
        )
        print(f"    {args.prompt}{texts[name]!r}")
    weights, fewer = (model.report["weight_bytes"] for model in models.values())
    (state, smaller), (slow, fast) = states.values(), speeds.values()
    print(
        f"saved: {(weights - fewer) / 1e6:.1f} of {weights / 1e6:.1f} MB of weights, {(state - smaller) / 1e3:.0f} of "
        f"{state / 1e3:.0f} kB of state, {1 - slow / fast:.0%} of the time of a token"
    )


if __name__ == "__main__":
    main()
