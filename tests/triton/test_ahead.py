"""Machine code ahead of time, without a GPU: what it takes of a processor, and how it lies in an artefact."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
from encoders import encoder
from test_programs import compiled

import elision
from benchmarks.gpu_shapes import CHECKED, SHAPES, shaped
from elision.cli.gpu import compiled as compiled_lines
from elision.cli.gpu import kernels as tables_of
from elision.codegen.triton.ahead import build, totals
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.targets import TARGETS
from elision.codegen.triton.templates import TEMPLATES
from elision.errors import ArtefactError, BadInput
from elision.ir.launch import DeviceCode
from elision.runtime.cuda.artefact import LAUNCHES, member, members

#: The bytes that kernels of a model spill, by template; those of all others none.
SPILLS = {("smollm2", "cuda:sm_80"): {"attend": 16}}


def one_of_each(code: DeviceCode) -> DeviceCode:
    """The first kernel of every template, the ones of attention over drafts, and a projection of several tokens."""
    first = {k.template: n for n, k in reversed(code.kernels.items())}
    drafts = [n for n, k in code.kernels.items() if k.template == "attend" and k.constants["DRAFTED"]]
    several = [n for n, k in code.kernels.items() if k.template == "project" and k.constants["BM"] > 1]
    kept = {*first.values(), *drafts[:1], *several[:1]}
    return DeviceCode({n: k for n, k in code.kernels.items() if n in kept}, {}, {})


#: Methods whose caches take kernels of their own: pages, scores of drafts by a noisy softmax, codes of few bits.
METHODS = [
    ("insert-cache:dtype=int8", "quest:budget=1024,dense=0"), ("keyformer:budget=1024,recent=60", "prompt-lookup"),
    ("kivi:bits=2",), ("kv-quant:bits=4",),
]  # fmt: skip


#: Bytes: none with Triton 3.6, 8 in one kernel with 3.8, 16 in one with 3.9, on sm_80.
SPILLED = 16


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_of_every_kind_compiles_without_spills(target: str) -> None:
    """Of the shapes of Mixtral, with K-quants and a cache of bytes; then what methods have besides."""
    code = one_of_each(plan_program(shaped("mixtral", ("int4:group=32", "insert-cache:dtype=int8"), stored="Q5_K")))
    others = [shaped("llama-3-8b", method) for method in METHODS]
    others.append(compiled("LlamaConfig", ("fastv:layer=1,keep=0.5",), num_hidden_layers=2).program)
    for method in ("tome:n=2", "evit:layers=0", "zero-tprune:layers=0,rounds=3"):
        others.append(elision.compile(encoder("ViTModel", num_hidden_layers=2), passes=[method], target="reference").program)
    others += [compiled("LlamaConfig", (drafter,), "bfloat16").program for drafter in ("prompt-lookup", "token-recycling")]
    for i, program in enumerate(others):
        there = {k.template for k in code.kernels.values()}
        codes = ("attend", "append") if 1 < i < len(METHODS) else ()
        more = one_of_each(plan_program(program)).kernels
        code.kernels.update({f"{n}_{i}": k for n, k in more.items() if k.template not in there or k.template in codes})
    assert {k.template for k in code.kernels.values()} == set(TEMPLATES)
    build(code, [target])
    found = totals(code, target)
    assert found["spills"] <= SPILLED and 16 <= found["registers"] <= 512 and found["shared"] <= 64 << 10, found
    for binary in code.binaries[target].values():
        assert binary.code[:4] == b"\x7fELF" and binary.registers > 0 and binary.threads % 32 == 0


@pytest.mark.nightly
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name,method", [*((n, ()) for n in SHAPES if n not in CHECKED), *(("llama-3-8b", m) for m in METHODS)]
)
def test_every_kernel_of_a_model_compiles(name: str, method: tuple[str, ...], target: str) -> None:
    code = plan_program(shaped(name, method))
    assert not any(code.hosts.values())
    build(code, [target])
    spilling = {code.kernels[n].template: b.spills for n, b in code.binaries[target].items() if b.spills}
    assert spilling == SPILLS.get((name, target), {}) and totals(code, target)["kernels"] == len(code.kernels)


@pytest.mark.nightly
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", ["int4(group=32)", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_products_with_encoded_weights_compile_without_spills(format: str, target: str) -> None:
    """For one token, some and many, with one weight and with two; shared memory is what gfx942 has."""
    planned = plan_program(shaped("llama-3-8b", ("int4:group=32",), stored=format)).kernels
    code = DeviceCode({n: k for n, k in planned.items() if k.template in ("gemv", "gemm", "embed")}, {}, {})
    build(code, [target])
    assert len(code.kernels) > 12
    assert {n: (b.spills, b.shared) for n, b in code.binaries[target].items() if b.spills or b.shared > 64 << 10} == {}


def test_an_artefact_has_what_was_compiled(tmp_path: Path) -> None:
    model = compiled("LlamaConfig")
    code = plan_program(model.program)
    kept = one_of_each(code)
    build(kept, ["cuda:sm_80", "hip:gfx942"])
    for target, made in kept.binaries.items():  # the others take the code of the one of their template
        of = {kept.kernels[n].template: b for n, b in made.items()}
        code.binaries[target] = {n: of[k.template] for n, k in code.kernels.items()}
    model.gpu = code
    path = tmp_path / "model.elision"
    model.save(path)
    found = elision.load(path).gpu
    assert found is not None and found.kernels == code.kernels and found.binaries == code.binaries
    assert members(found) == members(code)
    line = next(iter(compiled_lines(found)))
    assert re.match(rf"cuda:sm_80: {len(code.kernels)} kernels, [\d.]+ MB, at most \d+ registers and \d+ KB shared memory", line)
    tables = list(tables_of(model))
    assert [t.title for t in tables] == ["cuda:sm_80", "hip:gfx942"] and tables[0].row_count == len(code.kernels)
    with zipfile.ZipFile(path) as archive:
        names, manifest = archive.namelist(), json.loads(archive.read("manifest.json"))
        cubin = archive.read(member("cuda:sm_80", "embed_0"))
    assert member("hip:gfx942", "embed_0") == "kernels/hip-gfx942/embed_0.hsaco" and member("hip:gfx942", "embed_0") in names
    assert manifest["targets"] == ["reference", "cuda:sm_80", "hip:gfx942"] and not any("pickle" in n for n in names)
    assert manifest["device"]["sha256"][member("cuda:sm_80", "embed_0")] == hashlib.sha256(cubin).hexdigest()


def test_code_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("LlamaConfig")
    model.gpu = DeviceCode({}, {}, {}, {"cuda:sm_80": {}})
    described = "elision.runtime.artefact.device_code.describe"
    for digest, text in (("0" * 64, "does not match"), (hashlib.sha256(b"{}").hexdigest(), "not what the compiler writes")):
        monkeypatch.setattr(described, lambda *_, d=digest: {"targets": ["cuda:sm_80"], "sha256": {LAUNCHES: d}})
        monkeypatch.setattr("elision.runtime.artefact.device_code.members", lambda *_: {LAUNCHES: b"{}"})
        model.save(tmp_path / "model.elision")
        with pytest.raises(ArtefactError, match=text):
            elision.load(tmp_path / "model.elision")


@pytest.mark.parametrize("target", ["cuda:90", "cuda:sm_9x", "hip:90", ["cpu", "reference"], "tpu", []])
def test_unknown_targets(target: str | list[str]) -> None:
    with pytest.raises(BadInput, match="target"):
        elision.compile("smollm2", target=target)


def test_a_kernel_that_cannot_be_compiled_is_named() -> None:
    code = one_of_each(plan_program(compiled("LlamaConfig").program))
    name = next(n for n, k in code.kernels.items() if k.template == "restrict")
    broken = DeviceCode({name: code.kernels[name]}, {}, {})
    broken.kernels[name].constants["BK"] = 3  # type: ignore[index]
    with pytest.raises(BadInput, match=rf"{re.escape(name)} for cuda:sm_90 was not compiled"):
        build(broken, ["cuda:sm_90"])
