"""Tiny random encoders, shaped so that a wrong position, token type or padding changes their outputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
#: Model class to (configuration class, values).
TEXTS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"Bert{head}": (T.BertConfig, TEXT)
        for head in ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    },
    "BertForPreTraining": (T.BertConfig, TEXT),
    "RobertaModel": (T.RobertaConfig, {**TEXT, "pad_token_id": 1}),
    "AlbertModel": (T.AlbertConfig, {**TEXT, "embedding_size": 16}),
    "ElectraModel": (T.ElectraConfig, {**TEXT, "embedding_size": 16}),
    "DistilBertModel": (T.DistilBertConfig, DISTIL),
    "NomicBertModel": (T.NomicBertConfig, TEXT),
}
IMAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ViTModel": (T.ViTConfig, IMAGE),
    "ViTForImageClassification": (T.ViTConfig, {**IMAGE, "num_labels": 10}),  # as many labels as tokens
    "DeiTModel": (T.DeiTConfig, IMAGE),
    "Dinov2WithRegistersModel": (T.Dinov2WithRegistersConfig, IMAGE),
    "CLIPVisionModelWithProjection": (T.CLIPVisionConfig, {**IMAGE, "projection_dim": 24}),
}


def encoder(name: str, **changes: Any) -> nn.Module:
    """A model of that class with random weights of a size that keeps its tokens apart."""
    cls, values = {**TEXTS, **IMAGES}[name]
    model: nn.Module = getattr(T, name)(cls(**{**values, **changes})).eval()
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise * (1.0 if "embed" in name else 1.5 * p.shape[-1] ** -0.5) if p.dim() > 1 else p.data + 0.1 * noise
    return model.eval()


def texts(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids, token types and a mask that pads the rows on the right, each more than the last."""
    generator = torch.Generator().manual_seed(seed)
    ids, types = (torch.randint(low, high, (rows, length), generator=generator) for low, high in ((3, 99), (0, 2)))
    lengths = [max(1, length - 3 * row) for row in range(rows)]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def images(rows: int, size: int = 24) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))
