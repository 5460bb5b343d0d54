"""Chat templates: a conversation becomes a prompt, as transformers' ``apply_chat_template`` renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from elision.errors import BadInput

# What wrong data can make an expression of a template raise, beside Jinja's own errors.
_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


class ChatTemplate:
    """A compiled chat template: foreign code, so it runs in Jinja's immutable sandbox and sees plain data."""

    def __init__(self, source: str) -> None:
        """Raises `BadInput` if ``source`` is not a template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_Namespace)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadInput(f"the model's chat template is not valid: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool,
    ) -> str:
        """The prompt of ``messages``, their ``None`` fields left out. Raises `BadInput` if it is refused."""
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise BadInput('a conversation is a list of messages such as {"role": "user", "content": "Hi"}')
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            plain = json.loads(json.dumps(given))
        except (TypeError, ValueError) as error:
            raise BadInput(f"a message must consist of text, numbers, lists and mappings: {error}") from error
        try:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise BadInput(f"the model's chat template refuses this conversation: {error}") from error


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; a prompt is the same without it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace`` without underscore names, by which a template could fake Python internals."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own ``tojson`` escapes for HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
