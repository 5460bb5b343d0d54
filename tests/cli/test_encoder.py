"""An encoder from a directory: what can be shown of it, and what is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from elision.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=8)
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=5)).save_pretrained(path)
    return path


def test_show_and_refusals(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        try:
            main(list(args))
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    code, out, _ = run("show", str(folder))
    assert code == 0 and "patches(pixel_values" in out and "classifier.weight" in out  # the class that the directory names
    code, out, _ = run("show", str(folder), "--coverage", "--svg", str(tmp_path / "vit.svg"), "--cost")
    assert code == 0 and "0 opaque" in out and "score: 10 tokens" in out
    for verb, says in ((["run", str(folder), "hello"], "generates no text"), (["bench", str(folder)], "no tokens/s to measure")):
        code, _, err = run(*verb)
        assert code == 2 and says in err.splitlines()[-1]
