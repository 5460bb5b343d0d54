"""The tiny models that lists of passes are tried on: what they compile to, what is compared of that, and what torch says of the
model that a list of passes means."""

from __future__ import annotations

import copy
import functools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from encoders import encoder
from gguf_files import write_model
from torch import nn

import elision
from elision.codegen.cpu.compile import compile_program
from elision.compiler import _draft
from elision.frontend.capture import capture
from elision.frontend.raising import raise_model
from elision.frontend.source import load_source
from elision.frontend.stored import Stored, blocks_of
from elision.ir.coverage import coverage
from elision.ir.drafting.model import ModelDrafting
from elision.ir.drafting.policy import Always
from elision.ir.program import Program, Weights
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.store import KVStore
from elision.ir.types import DTYPES
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.ir.weights import Blocks
from elision.passes import InsertCache
from elision.passes.calibration import Calibrated, Choosing, Text
from elision.passes.pipeline import resolve, transform
from elision.runtime.edits import edit
from elision.runtime.session import Session
from tests.passes.small import tiny

NEW = 20  # tokens after the prompts: every clock ticks
LAYERS = 4
PROMPTS = (50, 33)  # tokens


def calibration() -> torch.Tensor:
    return torch.randint(0, 64, (6, 40), generator=torch.Generator().manual_seed(3))


class Subject(ABC):
    """A model that lists of passes are applied to. ``name``: of its table."""

    name: str
    seed = 1  # of what it reads
    program: Program
    weights: Weights
    stored: Mapping[str, Stored]

    def transformed(self, passes: Sequence[str], weights: Weights | None = None) -> tuple[Program, Weights]:
        """As `elision.compile` does, but the model is raised once. Raises what that raises. ``weights``: instead of its own."""
        chosen = resolve(text.replace("MODEL", _other()) if "MODEL" in text else text for text in passes)
        if self.program.meta["causal"] and not any(isinstance(p, InsertCache) for p in chosen):
            chosen.insert(0, InsertCache())
        text = Text(calibration() if any(isinstance(p, Calibrated | Choosing) for p in chosen) else None)
        return transform(self.program, weights or self.weights, chosen, text, self.stored if weights is None else None)

    def model(self, program: Program, weights: Weights, native: bool) -> elision.Model:
        room = self.program.meta["positions"]
        more: dict[str, Any] = {"tokenizer": None, "defaults": {}, "coverage": {}, "max_context": room, "threads": 1}
        return elision.Model(program, weights, native=compile_program(program) if native else None, **more)

    @abstractmethod
    def outputs(self, model: elision.Model, poison: float | None = None) -> torch.Tensor:
        """The numbers of a run whose inputs are given beforehand. ``poison``: what caches are filled with at first."""

    def eager(self, weights: Weights, gone: frozenset[str]) -> torch.Tensor | None:
        """The same numbers by torch, of the original model with these weights and without these layers (``1``) and halves
        (``1.attn``); None where torch has no such model."""
        return None

    def without(self, gone: frozenset[str], weights: Weights) -> tuple[Subject, Weights] | None:
        """The model without these layers and halves, with these weights, for other passes; None where there is none."""
        return None


@functools.cache
def _other() -> str:
    """A model of the same vocabulary that drafts: the decoder with its weights as bytes."""
    path = str(Path(tempfile.mkdtemp()) / "draft.elision")
    program, weights = decoder().transformed(["int8"])
    model = decoder().model(program, weights, native=False)
    model.coverage = coverage(decoder().program, program)
    model.save(path)
    return path


@dataclass
class Forced(Requests):
    """Keeps the logits of a round, and goes on with a given token."""

    then: Sequence[int] = ()
    logits: list[torch.Tensor] = field(default_factory=list)

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, at: Any = None) -> Any:
        self.logits.append(logits.clone())
        paths, _ = super().verify(ids, logits, *rest, **({} if at is None else {"at": at}))
        return paths, torch.tensor(self.then, dtype=torch.int64)


class Generating(Subject):
    """A model that continues prompts."""

    def prompts(self) -> list[list[int]]:
        """They say the same again and again, so that drafters find something."""
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randint(1, 9, (n,), generator=generator).tolist() for n in PROMPTS]

    def forced(self) -> torch.Tensor:
        """What every run goes on with, whatever it says ``[rows, NEW]``."""
        return torch.randint(1, 64, (len(PROMPTS), NEW), generator=torch.Generator().manual_seed(2))

    @torch.inference_mode()
    def outputs(self, model: elision.Model, poison: float | None = None) -> torch.Tensor:
        """Logits ``[rows, 1 + NEW, vocab]``: after the prompts, and after each of the tokens that follow."""
        prompts = edit(model._interpreter, self.prompts(), None).prompts
        rows, forced = len(prompts), self.forced()
        room = model.max_context
        session = Session(model._interpreter, rows, room)
        for name, type in model.program.states.items():
            if poison is not None and isinstance(type, KV):
                store = session._stores[name] = KVStore(type, rows, room, DTYPES[model.program.meta["dtype"]], poison)
                if model.native is not None:  # which marks nothing as written
                    store.poison = None
        found, said = [session.prefill(prompts)], [list(p) for p in prompts]
        for at in range(NEW):
            for r in range(rows):
                said[r].append(int(forced[r, at]))
            items = [Request(Warp(), False, 0, r) for r in range(rows)]
            histories = [torch.tensor(s) for s in said]
            requests = Forced(items, histories, [len(p) for p in prompts], then=[1] * rows)
            session.round({r: s[-1] for r, s in enumerate(said)}, requests)
            found += requests.logits
        return torch.stack(found, 1).float()

    def tokens(self, model: elision.Model) -> torch.Tensor:
        """Greedy tokens, with about 12 drafted nodes in every round where something drafts."""
        drafting = model.drafting
        if drafting is not None:
            drafting.policy = Always(12)
            if not isinstance(drafting, ModelDrafting):
                drafting.drafters = list(drafting.drafters)
        longest = max(PROMPTS)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in self.prompts()])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts()])
        found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW)
        assert isinstance(found, torch.Tensor)
        return found


def _format(name: str) -> str:
    return "F32" if "norm" in name else "Q5_1" if "mlp" in name else "Q8_0"


class Decoder(Generating):
    """A Llama of four layers, two query heads for each key head, read from a file with blocks, so that `stored` has something to
    keep, not all of which `int8` keeps as it is."""

    name = "decoder"

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            original = tiny(num_hidden_layers=LAYERS, initializer_range=0.12, intermediate_size=64)
            for layer in original.model.layers[1:]:  # change what the stream says less, so that drafts of fewer layers are taken
                layer.self_attn.o_proj.weight.data *= 0.5
                layer.mlp.down_proj.weight.data *= 0.5
            path = Path(folder) / "tiny.gguf"
            write_model(path, "llama", original, formats=_format)
            source = load_source(path)
            self.torch = source.model
            found = raise_model(capture(source.model), source.name, positions=source.positions)
            self.stored = blocks_of(found.weights, source.model, source.stored)
        self.program, self.weights = found.program, found.weights
        self.program.stored = {name: Blocks(blocks.format) for name, blocks in self.stored.items()}
        self.program.models = functools.cache(functools.partial(_draft, None))

    def edited(self, weights: Weights, gone: frozenset[str]) -> Weights:
        """Weights with which these layers and halves add nothing to the stream."""
        parts = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
        zero = {
            f"model.layers.{each.partition('.')[0]}.{at}.weight"
            for each in gone
            for part, at in parts.items()
            if each.partition(".")[2] in ("", part)
        }
        return {n: torch.zeros_like(w) if n in zero else w for n, w in weights.items()}

    @torch.inference_mode()
    def eager(self, weights: Weights, gone: frozenset[str]) -> torch.Tensor:
        model = copy.deepcopy(self.torch)
        model.load_state_dict({n: w for n, w in self.edited(weights, gone).items() if n in model.state_dict()}, strict=False)
        found = []
        for prompt, then in zip(self.prompts(), self.forced().tolist(), strict=True):
            found.append(model(torch.tensor([prompt + then])).logits[0, len(prompt) - 1 :])
        return torch.stack(found).float()

    def without(self, gone: frozenset[str], weights: Weights) -> tuple[Subject, Weights]:
        return self, self.edited(weights, gone)


class Passing(nn.Module):
    """In the place of a layer: the stream as it came."""

    def forward(self, h: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        return h


class Encoder(Subject):
    """A BERT of four layers that reads tokens."""

    name = "encoder"

    def __init__(self, gone: frozenset[str] = frozenset()) -> None:
        self.torch: Any = encoder("BertModel", num_hidden_layers=LAYERS, intermediate_size=64)
        for layer in gone:
            self.torch.encoder.layer[int(layer)] = Passing()
        found = raise_model(capture(self.torch), "bert", positions=64)
        self.program, self.weights, self.stored = found.program, found.weights, {}

    def inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 99, (2, 23), generator=torch.Generator().manual_seed(self.seed))
        mask = (torch.arange(23) < torch.tensor([23, 14])[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}

    def outputs(self, model: elision.Model, poison: float | None = None) -> torch.Tensor:
        return self._kept(model(**self.inputs()))

    def _kept(self, found: Any) -> torch.Tensor:
        mask = self.inputs()["attention_mask"].bool()
        return found["last_hidden_state"][mask].float()

    @torch.inference_mode()
    def eager(self, weights: Weights, gone: frozenset[str]) -> torch.Tensor | None:
        if any("." in each for each in gone):
            return None
        model = copy.deepcopy(_encoder(gone).torch)
        model.load_state_dict({n: w for n, w in weights.items() if n in model.state_dict()}, strict=False)
        return self._kept(model(**self.inputs()))

    def without(self, gone: frozenset[str], weights: Weights) -> tuple[Subject, Weights] | None:
        if any("." in each for each in gone):
            return None
        other = _encoder(gone)
        return other, {n: weights[n] for n in other.weights}


@functools.cache
def _encoder(gone: frozenset[str]) -> Encoder:
    return Encoder(gone)


@functools.cache
def decoder() -> Decoder:
    return Decoder()


def encoding() -> Encoder:
    return _encoder(frozenset())
