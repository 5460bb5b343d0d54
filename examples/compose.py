"""Compose passes: what each leaves out of SmolLM2, what they leave out together, and what the verifier says to a bad pair.

python examples/compose.py [MODEL] [--layer 17]
"""

from __future__ import annotations

import argparse

import elision

PROMPT = "The three primary colours are"
H2O = "h2o:budget=128,recent=32"
GOOD = ("", "{skip}", "int8", H2O, f"{{skip}} int8 a8 {H2O} kv-quant:bits=8 token-recycling")
BAD = "calm:exits=1 skipdecode:speedup=1.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--layer", type=int, default=17, help="the one whose MLP is left out")
    args = parser.parse_args()

    for text in GOOD:
        passes = text.format(skip=f"skip-layers:layers={args.layer},half=mlp").split()
        model = elision.compile(args.model, passes=passes)
        text = model.generate(PROMPT, max_new_tokens=24, min_new_tokens=24, temperature=0)
        report, stats = model.report, model.stats
        assert stats is not None
        print(f"{' '.join(passes) or 'as it is'}\n    {report['weight_bytes'] / 1e6:.2f} MB of weights, ", end="")
        print(f"{report['state_bytes'] / 1e6:.1f} MB of state at {model.max_context} tokens, ", end="")
        print(f"{stats.tokens_per_second:.0f} tokens/s, {report['quality']}: {text!r}")

    print(f"\n{BAD}")
    try:
        elision.compile(args.model, passes=BAD.split())
    except elision.IllegalProgram as err:  # before anything runs
        print(err)


if __name__ == "__main__":
    main()
