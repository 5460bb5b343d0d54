"""Compiled models in EleutherAI's lm-evaluation-harness: ``python -m elision.harness --model elision --model_args model=..``.

The harness knows no plug-ins, so this registers the model and hands on to its own command line. Continuations are scored as text
is generated: the context is read, then the model is told one token after another. So what a pass does to the cache, to prompts or
to the depth of a step counts, which a forward over the whole text would not show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import lm_eval.models  # noqa: F401  (the harness looks for its own models only where there are none)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from elision.compiler import compile, load
from elision.errors import BadInput
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.edits import edit
from elision.runtime.model import Model
from elision.runtime.session import Session

NEW_TOKENS = 256  # of generate_until, where a task does not say


@register_model("elision")
class ElisionLM(TemplateLM):
    """``model``: what `elision.compile` takes, or an artefact. ``passes``: separated by spaces or a list. ``batch_size``:
    sequences at once. ``options``: ``max_context``, ``threads``, ``dtype``, ``kv_dtype`` and ``target`` of `elision.compile`."""

    def __init__(
        self, model: str | Model = "smollm2", passes: str | Sequence[str] = (), batch_size: int | str = 1, **options: Any
    ) -> None:
        super().__init__()
        for name in ("device", "max_batch_size"):  # which the harness always gives
            options.pop(name, None)
        self.rows = int(batch_size)
        chosen = passes.split() if isinstance(passes, str) else list(passes)
        if isinstance(model, Model):
            self.model = model
        elif str(model).endswith(".elision"):
            if chosen:
                raise BadInput(f"{model} is compiled already: give its passes to elision.compile")
            self.model = load(model, **options)
        else:
            self.model = compile(model, passes=chosen, max_batch=self.rows, **options)
        if self.model.tokenizer is None or "step" not in self.model.program.entries:
            raise BadInput(f"{self.model.program.name} has no tokenizer or does not generate; expected a language model with one")
        if self.model.drafting is not None:
            raise BadInput("speculation does not change what is generated: leave it out, each token is told here")
        self.text = self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        eos = self.model.defaults.get("eos_token_id")
        if eos is None:
            raise BadInput(f"{self.model.program.name} names no end of text, which texts without a context begin with")
        return int(eos if isinstance(eos, int) else eos[0])

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.program.name)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.text.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text.chat(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begins = self.text.special_tokens.get("bos_token")
        special = not (begins and string.startswith(begins)) if add_special_tokens is None else add_special_tokens
        return self.text.encode(string, add_special=special)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the log-likelihood of the continuation, and whether it is the greedy one."""
        limit, found = self.model.max_context, []
        for some in _parts(requests, self.rows):
            parts = [(context[-(limit - len(after)) :], after) for _, context, after in some]
            scores = self._told([(c, a) for c, a in parts])
            found += scores
            for (texts, *_), score in zip(some, scores, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def _told(self, parts: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The scores of continuations of one batch."""
        for _, after in parts:
            if not 0 < len(after) < self.model.max_context:
                raise BadInput(f"a continuation of {len(after)} tokens; expected 1 to {self.model.max_context - 1}")
        with torch.inference_mode():
            prompts = edit(self.model._interpreter, [c for c, _ in parts], self.text).prompts
            afters = [a for _, a in parts]
            whole = [[*p, *a] for p, a in zip(prompts, afters, strict=True)]
            session = Session(self.model._interpreter, len(parts), max(map(len, whole)))
            items = [Request(Warp(), True, 0, r) for r in range(len(parts))]
            told = Told(items, list(map(torch.tensor, whole)), list(map(len, prompts)), after=afters)
            told.begin(session.prefill(prompts))
            for i in count():
                rows = {r: a[i] for r, a in enumerate(afters) if i + 1 < len(a)}
                if not rows:
                    break
                session.round(rows, told)
        return list(zip(told.score, told.greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of as many tokens as the model has positions."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.max_context - 1,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string; contexts that are too long lose their beginning."""
        found: list[str] = []
        for some in _parts(requests, self.rows):
            for asked, prompts in _alike(some):
                settings = dict(asked)
                stop = settings.pop("until", None)
                new = min(settings.pop("max_gen_toks", NEW_TOKENS), max(self.model.max_context // 2, 1))
                texts = [self._cut(p, max(self.model.max_context - new, 1)) for p in prompts]
                out = self.model.generate(texts, stop=stop, max_new_tokens=new, **{"do_sample": False, **settings})
                found += out
                for prompt, text in zip(prompts, out, strict=True):
                    self.cache_hook.add_partial("generate_until", (prompt, asked), text)
        return found

    def _cut(self, text: str, most: int) -> str:
        ids = self.tok_encode(text)
        return text if len(ids) <= most else self.text.decode(ids[-most:])


@dataclass
class Told(Requests):
    """Gives every sequence the token that it is told, and adds up how likely it was."""

    after: list[list[int]] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    def begin(self, logits: torch.Tensor) -> None:
        """The first tokens, from the logits ``[rows, vocab]`` after the contexts."""
        self.score, self.greedy = [0.0] * len(self.after), [True] * len(self.after)
        for r, tokens in enumerate(self.after):
            self._tell(r, tokens[0], logits[r])

    def verify(
        self, ids: torch.Tensor, logits: torch.Tensor, best: torch.Tensor, at: Tokens, drafted: Any = None, rule: Any = None
    ) -> tuple[list[list[int]], torch.Tensor]:
        rows = at.row.tolist()
        wanted = [self.after[r][p + 1 - self.prompts[r]] for r, p in zip(rows, at.pos.tolist(), strict=True)]
        for r, token, line in zip(rows, wanted, logits, strict=True):
            self._tell(r, token, line)
        return [[0] if r in rows else [] for r in range(len(self.items))], torch.tensor(wanted)

    def _tell(self, row: int, token: int, logits: torch.Tensor) -> None:
        self.score[row] += float(logits.float().log_softmax(-1)[token])
        self.greedy[row] &= int(logits.argmax()) == token


def _parts(requests: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (requests[i : i + size] for i in range(0, len(requests), size))


def _alike(requests: Iterable[Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """Neighbours with equal settings together."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for prompt, settings in (request.args for request in requests):
        if not found or found[-1][0] != settings:
            found.append((dict(settings), []))
        found[-1][1].append(prompt)
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
