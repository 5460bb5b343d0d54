"""A compiled model where transformers expects one of its own: pipelines, `GenerationConfig`, streamers.

transformers is imported only when something of it is asked for, so an artefact still runs without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property, wraps
from typing import Any, Self

import torch

from elision.errors import BadInput
from elision.ir.types import DTYPES
from elision.runtime.model import Model

#: Arguments of transformers' ``generate`` that ask for what is done anyway.
_NATURAL: dict[str, Any] = {
    "assistant_model": None,
    "begin_suppress_tokens": None,
    "cache_implementation": "dynamic",
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "remove_invalid_values": False,
    "return_dict_in_generate": False,
    "synced_gpus": False,
    "typical_p": 1.0,
    "use_cache": True,
}
#: Facts that a generation config carries and that ask for nothing.
_FACTS = ("transformers_version", "bos_token_id", "_from_model_config")
_KNOWN = tuple(inspect.signature(Model.generate).parameters)[1:]


class CompiledModel(Model):
    """What `elision.compile` and `elision.load` return: `Model`, with what transformers asks a model for."""

    main_input_name = "input_ids"
    input_modalities = output_modalities = ("text",)

    @classmethod
    def of(cls, model: Model) -> Self:
        """The same model, sharing everything."""
        found = cls.__new__(cls)
        found.__dict__.update(model.__dict__)
        return found

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")  # of what it takes and gives, also where it runs on a GPU

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.program.meta["dtype"]]

    def can_generate(self) -> bool:
        return "step" in self.program.entries

    def to(self, device: Any) -> Self:
        """Raises BadInput for another device than the processor."""
        if torch.device(device).type != "cpu":
            raise BadInput(f"device {str(device)!r}: the model was compiled for the CPU; as in pipeline(..., device='cpu')")
        return self

    def eval(self) -> Self:
        return self

    @cached_property
    def generation_config(self) -> Any:
        """transformers' `GenerationConfig` of the model's defaults. What is written to it counts from then on."""
        import transformers

        return transformers.GenerationConfig(**self.defaults)

    @cached_property
    def config(self) -> Any:
        """transformers' `PreTrainedConfig`, with the model's special tokens."""
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("elision", type(self).__name__)  # else a pipeline complains of the class
        ids = {n: v for n, v in self.defaults.items() if n in ("eos_token_id", "pad_token_id")}
        return transformers.PreTrainedConfig(architectures=[type(self).__name__], **ids)

    @wraps(Model.generate)
    def generate(self, *args: Any, generation_config: Any = None, **given: Any) -> Any:  # type: ignore[override]
        own = self._written()
        settings = {**(own if generation_config is None else _read(generation_config))}
        settings |= {n: v for n, v in given.items() if v is not None}
        if generation_config is not None and settings.get("do_sample") is None:
            settings["do_sample"] = bool(self.defaults.get("do_sample", False))  # a temperature alone does not ask for it
        return super().generate(*args, **_arguments(settings, args))

    def _written(self) -> dict[str, Any]:
        """Takes over what was written to the model's generation config, and gives what is none of the defaults."""
        if (own := self.__dict__.get("generation_config")) is None:
            return {}
        from elision.frontend.source import GENERATION

        self.defaults = {n: v for n in GENERATION if (v := getattr(own, n, None)) is not None}
        return {n: v for n, v in _read(own).items() if n not in GENERATION}


def _read(config: Any) -> Mapping[str, Any]:
    """What a generation config sets."""
    if config is None:
        return {}
    if not hasattr(config, "to_diff_dict"):
        raise BadInput(f"generation_config: expected a transformers.GenerationConfig, got {type(config).__name__}")
    return {n: v for n, v in config.to_diff_dict().items() if n not in _FACTS and v is not None}


def _arguments(settings: Mapping[str, Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of `Model.generate` that transformers' ask for the same. Raises BadInput naming those that have none."""
    found = dict(settings)
    if "input_ids" in found:
        found["inputs"] = found.pop("input_ids")
    if "stop_strings" in found:
        found["stop"] = found.pop("stop_strings")
        found.pop("tokenizer", None)  # the model's own reads them
    inputs = args[0] if args else found.get("inputs")
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if found.get(total) and new not in found:
            if not isinstance(inputs, torch.Tensor):
                raise BadInput(f"{total}={found[total]} counts the prompt's tokens too: with texts, give {new}")
            found[new] = max(found[total] - inputs.shape[-1], int(total == "max_length"))
        if new in found:
            found.pop(total, None)
    found = {n: v for n, v in found.items() if n in _KNOWN or n not in _NATURAL or v != _NATURAL[n]}
    if unknown := [f"{n}={v!r:.60}" for n, v in found.items() if n not in _KNOWN]:
        raise BadInput(f"generate does not support {', '.join(unknown)}; its arguments are {', '.join(_KNOWN)}")
    return found
