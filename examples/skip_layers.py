"""Leave layers out of a model: what that saves, and what it costs in perplexity.

python examples/skip_layers.py [MODEL] [--layers 5+17-18] [--half attn|mlp]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch.nn.functional import cross_entropy

import elision

TEXT = """The harbour was quiet in the early morning. A fishing boat came in slowly, its engine a low murmur, and two men threw ropes to a
boy who stood waiting on the stone quay. Behind him the town was waking: a baker opened his shutters, a dog barked, and the bells of the
church rang six times. Plants turn light into chemical energy: chlorophyll in the leaves absorbs sunlight, and this energy is used to make
sugar from water and carbon dioxide. Oxygen is released as a by-product."""


def perplexity(model: elision.Model, text: str) -> float:
    """How surprised the model is by each token of the text, given those before it."""
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode(text)])
    logits = model(input_ids=ids).logits[0]
    return math.exp(cross_entropy(logits[:-1].float(), ids[0, 1:]).item())


def show(name: str, model: elision.Model, prompt: str) -> tuple[float, int, int]:
    """Print what the model does; its tokens per second, bytes of weights and bytes of state."""
    text = model.generate(prompt, max_new_tokens=32, min_new_tokens=32, temperature=0)
    stats = model.stats
    assert stats is not None
    weights = sum({w.data_ptr(): w.nbytes for w in model.weights.values()}.values())
    print(f"{name}: {len(model.program.layers)} layers, perplexity {perplexity(model, TEXT):.1f}, {stats.tokens_per_second:.1f} tokens/s")
    print(f"    {prompt}{text!r}")
    return stats.tokens_per_second, weights, stats.state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--layers", default="5+17-18", help="layers to leave out, from 0 (default: %(default)s)")
    parser.add_argument("--half", choices=("attn", "mlp"), help="leave out just this half of them")
    parser.add_argument("--prompt", default="The three primary colours are")
    args = parser.parse_args()

    half = f",half={args.half}" if args.half else ""
    pass_text = f"skip-layers:layers={args.layers}{half}"
    speed, weights, state = show("all layers", elision.compile(args.model), args.prompt)
    new_speed, new_weights, new_state = show(pass_text, elision.compile(args.model, passes=[pass_text]), args.prompt)
    print(
        f"saved: {(weights - new_weights) / 1e6:.1f} of {weights / 1e6:.1f} MB of weights, {(state - new_state) / 1e3:.0f} of "
        f"{state / 1e3:.0f} kB of state, {1 - speed / new_speed:.0%} of the time of a token"
    )


if __name__ == "__main__":
    main()
