"""A Hugging Face tokenizer becomes what an artefact keeps of it: ``tokenizer.json`` and settings."""

from __future__ import annotations

from typing import Any

import tokenizers

from elision.errors import BadInput


def from_transformers(tokenizer: Any) -> tuple[bytes, dict[str, Any]]:
    """The bytes of ``tokenizer.json`` and the settings for ``elision.runtime.text.Tokenizer.from_json``.

    Whether BOS is added is part of ``tokenizer.json``. Of several chat templates the one named ``default`` is
    taken. Raises `BadInput` for a tokenizer that the ``tokenizers`` library does not run (a "slow" one).
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, tokenizers.Tokenizer):
        raise BadInput(
            f"{type(tokenizer).__name__} has no fast tokenizer behind it: expected one that can be saved as "
            "tokenizer.json; load it with AutoTokenizer.from_pretrained or convert it"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = {role: str(text) for role, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    return core.to_str().encode(), {"chat_template": template, "special_tokens": special}
