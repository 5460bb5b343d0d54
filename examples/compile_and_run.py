"""Compile a model once, keep it as one file, and open that file: what compiling ahead of time saves is the start.

python examples/compile_and_run.py [MODEL] [--prompt TEXT]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import elision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--prompt", default="The three primary colours are")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.elision"

        start = time.perf_counter()
        model = elision.compile(args.model)
        compiling = time.perf_counter() - start
        model.save(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, weights, tokenizer and program in one file")

        start = time.perf_counter()
        opened = elision.load(path)  # needs neither transformers nor the model's own files
        opening = time.perf_counter() - start

        expected = model.generate(args.prompt, max_new_tokens=24, temperature=0)
        text = opened.generate(args.prompt, max_new_tokens=24, temperature=0)
        assert text == expected, f"the artefact says {text!r}, the model {expected!r}"
        stats = opened.stats
        assert stats is not None

    print(f"{args.prompt}{text}")
    print(f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, {stats.state_bytes / 1e6:.2f} MB of state")
    print(f"saved: {compiling - opening:.1f} s of every start (compiling {compiling:.1f} s, opening {opening:.1f} s)")


if __name__ == "__main__":
    main()
