"""Artefacts whose digests are right and whose contents are not: opened, or refused by an error of our own; never a crash."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

import elision
from elision.errors import ArtefactError, ElisionError
from elision.runtime.archive import Archive, write_archive
from elision.runtime.text import Tokenizer

IDS = torch.tensor([[3, 5, 7, 11]])
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def model() -> elision.Model:
    """One layer of width 8 on bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=96, eos_token_id=None, initializer_range=1.0,
    )  # fmt: skip
    found = elision.compile(transformers.AutoModelForCausalLM.from_config(config))
    found.tokenizer = Tokenizer(core, {"chat_template": TEMPLATE, "special_tokens": {}})
    return found


@pytest.fixture(scope="module")
def members(model: elision.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("artefact") / "tiny.elision"
    model.save(path)
    archive = Archive.open(path)
    return {name: bytes(archive[name]) for name in archive}


def opens(path: Path, members: dict[str, bytes], run: bool) -> bool:
    """The artefact opens (and runs); False if it was refused. Any other exception is a failure."""
    write_archive(path, members)
    try:
        found = elision.load(path)
        if run:
            found.generate(IDS, max_new_tokens=3)
            found(IDS)
            assert found.report
    except ElisionError:
        return False
    return True


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ():
        yield (*above, key)
        yield from places(value[key], (*above, key))


def test_every_field_of_the_manifest_with_every_kind_of_value(members: dict[str, bytes], tmp_path: Path) -> None:
    manifest = json.loads(members["manifest.json"])
    outcomes: dict[str, set[bool]] = {}
    for place in places(manifest):
        for value in (None, -1, 2**70, 1.5, "x", [], {}, True, float("nan"), [None]):
            changed = copy.deepcopy(manifest)
            field = changed
            for key in place[:-1]:
                field = field[key]
            field[place[-1]] = value
            hostile = {**members, "manifest.json": json.dumps(changed).encode()}
            outcomes.setdefault(place[0], set()).add(opens(tmp_path / "x.elision", hostile, run=True))
    assert all(False in seen for seen in outcomes.values()), outcomes


def test_edited_programs(members: dict[str, bytes], tmp_path: Path) -> None:
    text = members["program.txt"].decode()
    lines, words, draw = text.split("\n"), re.findall(r"[\w.'-]+", text), random.Random(0)
    numbers = ["0", "1", "-1", "7", "99999999999", "1e30", "nan", "None", "True", "()", "''"]
    refused = 0
    for _ in range(400):
        edited = list(lines)
        line, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        kind = draw.randrange(3)
        if kind == 0:
            del edited[line]
        elif kind == 1:
            edited[line], edited[other] = edited[other], edited[line]
        elif found := list(re.finditer(r"[\w.'-]+", edited[line])):
            start, end = draw.choice(found).span()
            edited[line] = edited[line][:start] + draw.choice([*numbers, *draw.sample(words, 5)]) + edited[line][end:]
        refused += not opens(tmp_path / "x.elision", {**members, "program.txt": "\n".join(edited).encode()}, run=False)
    assert refused > 200


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b'{"chat_template": 1, "special_tokens": {}}',
        b'{"chat_template": "", "special_tokens": []}',
        b'{"chat_template": "", "special_tokens": {"eos_token": 2}}',
    ],
)
def test_damaged_text_settings_are_refused(text: bytes, members: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("text.json", "tokenizer.json"):
        write_archive(tmp_path / "x.elision", {**members, name: text})
        with pytest.raises(ArtefactError):
            elision.load(tmp_path / "x.elision")


def test_a_chat_without_transformers_gives_the_same_text(model: elision.Model, members: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "tiny.elision"
    write_archive(path, members)
    assert model.tokenizer is not None
    chat = model.tokenizer.chat("hello")
    assert chat == "<user>hello<assistant>"
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import json, elision\n"
        f"m = elision.load({str(path)!r})\n"
        "print(json.dumps(m.generate(m.tokenizer.chat('hello'), max_new_tokens=20)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.generate(chat, max_new_tokens=20)
