"""`elision show --mlir` and `--asm`, on an artefact."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import elision
from elision.cli import main


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("show") / "tiny.elision"
    elision.compile(LlamaForCausalLM(config)).save(path)
    return path


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as status:
        main(["show", *args])
    assert status.value.code == 0
    return capsys.readouterr().out


def test_kernels_are_listed_and_each_is_printed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = shown(capsys, str(path), "--asm").splitlines()[1:]
    names = [line.split()[0] for line in listed]
    assert any(n.startswith("attend_") for n in names) and any("step=" in line and "out:tensor" in line for line in listed)
    for name in (names[0], names[-1]):
        asm = shown(capsys, str(path), name, "--asm")
        assert asm.startswith(f"{name}:\n") and re.search(r"\n +[0-9a-f]+  ret", asm) and ".byte" not in asm
        assert shown(capsys, str(path), name, "--mlir").startswith(f"func.func @{name}(")


def test_an_op_stands_for_its_kernels(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asm = shown(capsys, str(path), "linear", "--asm")
    assert len(re.findall(r"^linear_\d+:", asm, re.M)) >= 2
    assert shown(capsys, str(path), "--mlir").count("func.func @linear_") == len(re.findall(r"^linear_\d+:", asm, re.M))


def test_an_unknown_kernel_is_refused_with_the_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, says in ((["nothing", "--asm"], "attend_"), (["linear"], "--mlir")):
        with pytest.raises(SystemExit) as status:
            main(["show", str(path), *args])
        assert status.value.code == 2 and says in capsys.readouterr().err
