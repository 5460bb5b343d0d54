"""A compiled model: generate, run forward, save. What `elision.compile` and `elision.load` return."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.launch import DeviceCode
from elision.ir.printer import print_program
from elision.ir.program import Program
from elision.ir.schedule import NativeCode
from elision.runtime import forward
from elision.runtime import generate as loop
from elision.runtime import prefix as prefixes
from elision.runtime.cuda.device import Device
from elision.runtime.cuda.engine import Engine as DeviceEngine
from elision.runtime.cuda.natives import Natives
from elision.runtime.edits import edit
from elision.runtime.native.engine import Engine
from elision.runtime.native.pool import physical_cores
from elision.runtime.native.weights import PackedWeights
from elision.runtime.options import resolve
from elision.runtime.prefix import Prefix
from elision.runtime.session import must_divide
from elision.runtime.speculation import drafting_of
from elision.runtime.text import Tokenizer


class Output(dict[str, torch.Tensor]):
    """A forward's outputs by name, also as attributes and by index, as transformers gives them."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; the outputs are {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> torch.Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Model:
    """A program with its weights. Calls may run at the same time from several threads; each has its own states. With a
    ``device`` it runs there (``gpu``: the code for it)."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        *,
        tokenizer: Tokenizer | None,
        defaults: Mapping[str, Any],
        coverage: Mapping[str, Any],
        max_context: int,
        max_batch: int = 8,
        threads: int | None = None,
        native: NativeCode | None = None,
        gpu: DeviceCode | None = None,
        device: Device | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise BadInput(f"threads={threads}; expected at least 1")
        self.program, self.weights, self.tokenizer = program, weights, tokenizer
        self.defaults, self.coverage = dict(defaults), dict(coverage)
        self.max_context, self.max_batch, self.threads = max_context, max_batch, threads
        self.stats: loop.Stats | None = None
        self.native, self.gpu, self.on_gpu = native, gpu, device is not None
        if device is not None:
            if gpu is None:
                raise BadInput(f"{program.name} has no code for GPUs: compile it with target='cuda:sm_90', for example")
            there = Natives(DeviceEngine(program, gpu, weights, device))
            self._interpreter = Interpreter(program, weights, there.entries(), there.commit, cache=there.cache)
            self.drafting = drafting_of(self._interpreter, repr((program.name, program.applied, "cuda", list(gpu.binaries))))
            return
        if native is None:
            self._interpreter = Interpreter(program, weights)
            self.drafting = drafting_of(self._interpreter, repr((program.name, program.applied, threads)))
            return
        packed = weights if isinstance(weights, PackedWeights) else PackedWeights.pack(program, weights, native.packings)
        self.engine = Engine(program, native, packed, threads or physical_cores())
        self.weights = packed
        commit = self.engine.commit if "commit" in native.schedules else None
        self._interpreter = Interpreter(program, packed, self.engine.natives(), commit)
        self.drafting = drafting_of(self._interpreter, f"{zlib.crc32(native.code)} {program.applied} {self.engine.threads}")

    @property
    def report(self) -> dict[str, Any]:
        """What was compiled: coverage, quality class, passes, bytes of weights and of state per token and row, cost per token."""
        from elision.runtime.report import report

        return report(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an artefact that `elision.load` opens, without transformers and without a compiler."""
        from elision.runtime.artefact import save

        save(self, path)

    def generate(
        self,
        inputs: torch.Tensor | str | Sequence[str],
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop: str | Sequence[str] | None = None,
        num_return_sequences: int = 1,
        seed: int | Sequence[int] = 0,
        streamer: Any = None,
        prefix: Prefix | None = None,
    ) -> Any:
        """Continue the prompts.

        ``inputs``: token ids ``[B, T]`` (left-padded; ``attention_mask`` marks the padding), or texts. Ids give ids ``[B
        * n, T + new]``: the padded prompt, then the new tokens, filled with the pad token; texts give the new texts. None
        means the model's generation config; ``eos_token_id=[]`` never ends at a token; temperature 0 is greedy. ``stop``
        strings end a row and are cut from its text, but kept in its tokens. ``seed``: one for the call or one per prompt; a
        row's tokens do not depend on the other rows. ``streamer``: an object with ``put``/``end`` (one row, as in
        transformers), or a function of (row, tokens, text) that ends a row by returning False. ``prefix`` (`Model.prefix`):
        what every prompt begins with; the result is that of the whole prompts, without the prefix in front of returned ids.
        """
        if "step" not in self.program.entries:
            raise BadInput(f"{self.program.name} has no decoder: call it as m(...) for its outputs")
        if not isinstance(num_return_sequences, int) or num_return_sequences < 1:
            raise BadInput(f"num_return_sequences={num_return_sequences!r}; expected an integer of at least 1")
        whole = self._prompts(inputs, attention_mask, prefix)
        with self._threads(self.threads if self.program.edits else None), torch.inference_mode():
            edited = edit(self._interpreter, whole, self.tokenizer)
        prompts = edited.prompts
        options = resolve(
            self.defaults,
            rows=len(prompts),
            copies=num_return_sequences,
            longest=max(map(len, prompts)),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            stop=stop,
            seed=seed,
        )
        if options.stop and self.tokenizer is None:
            raise BadInput("stop strings need a tokenizer, and this model came without one")
        prompts = [p for p in prompts for _ in range(num_return_sequences)]
        if len(prompts) > self.max_batch:
            raise BadInput(f"{len(prompts)} sequences, but the model was compiled for max_batch={self.max_batch}")
        on_tokens = _callback(streamer, [p for p in whole for _ in range(num_return_sequences)])
        with self._threads(self._beside("step", "prefill")), torch.inference_mode():
            if self.drafting is not None:
                self.drafting.policy.ready()
            rows, stats = loop.generate(
                self._interpreter, prompts, options, self.tokenizer, self.max_context, on_tokens, self.drafting, prefix
            )
        if hasattr(streamer, "end"):
            streamer.end()
        stats.removed = [r for r in edited.removed for _ in range(num_return_sequences)]
        stats.edit_time, stats.time_to_first_token = edited.seconds, stats.time_to_first_token + edited.seconds
        self.stats = stats
        if isinstance(inputs, torch.Tensor):
            most = max(len(row.tokens) for row in rows)
            new = torch.tensor([row.tokens + [options.pad] * (most - len(row.tokens)) for row in rows])
            return torch.cat((inputs.repeat_interleave(num_return_sequences, 0), new), 1)
        texts = [row.text for row in rows]
        return texts[0] if isinstance(inputs, str) and num_return_sequences == 1 else texts

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **other: Any,
    ) -> Output:
        """The model's own forward: its outputs by name, of every token ``[B, T, ...]`` (zeros at padding) or of every sequence
        ``[B, ...]``, on the device of the inputs. ``other``: its further inputs, such as ``token_type_ids`` (zeros if left out)
        or ``pixel_values``.
        """
        graph = self.program.entries["score"]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **other}
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        given |= {name: x.cpu() for name, x in tensors.items()}
        where = next((x.device for x in tensors.values()), torch.device("cpu"))
        with self._threads(self._beside("score")), torch.no_grad():
            batch = forward.batch(graph, given)
            self._check_length(batch.positions)
            found = self._interpreter.run(graph, batch.inputs, batch.axes)
            placed = forward.outputs(graph, self.program.meta["outputs"], batch, found)
            return Output({name: x.to(where) for name, x in placed.items()})

    def prefix(self, inputs: str | torch.Tensor) -> Prefix:
        """Read once what many prompts will begin with, a text or token ids ``[T]`` or ``[1, T]``: for ``generate(.., prefix=)``.
        `Prefix.save` keeps it, `elision.load_prefix` opens it again."""
        if "prefill" not in self.program.entries:
            raise BadInput(f"{self.program.name} has no decoder, so no prompt begins with anything")
        must_divide(self.program)
        if self.on_gpu:
            raise BadInput("a model on a GPU reads prompts whole: prefixes are for device='cpu'")
        given = inputs[None] if isinstance(inputs, torch.Tensor) and inputs.dim() == 1 else inputs
        prompts = self._prompts(given, None)
        if len(prompts) != 1:
            raise BadInput(f"{len(prompts)} prefixes at once; expected one text, or token ids [T]")
        with self._threads(self._beside("prefill")), torch.inference_mode():
            return prefixes.read(self, self._interpreter, prompts[0], inputs if isinstance(inputs, str) else None)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the program and the weights."""
        found = hashlib.sha256(print_program(self.program).encode())
        for name in self.program.params:
            found.update(name.encode())
            found.update(self.weights[name].reshape(-1).contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _prompts(self, inputs: Any, attention_mask: torch.Tensor | None, prefix: Prefix | None = None) -> list[list[int]]:
        if prefix is not None:
            if self.on_gpu:
                raise BadInput("a model on a GPU reads prompts whole: leave out prefix=, or load the model with device='cpu'")
            prefix.must_fit(self)
        if isinstance(inputs, torch.Tensor):
            ids, mask = forward.check_ids(inputs, attention_mask, self.program.meta["vocab"])
            prompts = [(prefix.ids if prefix else []) + row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        else:
            texts = [inputs] if isinstance(inputs, str) else list(inputs) if isinstance(inputs, Sequence) else []
            if not texts or not all(isinstance(t, str) for t in texts):
                raise BadInput(f"inputs: expected a LongTensor [B, T], a text or a list of texts, got {inputs!r:.80}")
            if self.tokenizer is None:
                raise BadInput("text needs a tokenizer, and this model came without one: pass token ids [B, T]")
            if attention_mask is not None:
                raise BadInput("attention_mask goes with token ids, not with texts")
            prompts = [self.tokenizer.encode(t) for t in (prefix.before(texts) if prefix else texts)]
        if prefix is not None:
            prefix.must_begin(prompts)
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise BadInput(f"prompt {i} is empty: expected at least one token")
            self._check_length(len(prompt) + 1)
        return prompts

    def _check_length(self, length: int) -> None:
        if length > self.max_context:
            raise BadInput(f"{length} positions are needed, but the model has {self.max_context} (max_context)")

    def _beside(self, *entries: str) -> int | None:
        """Torch's threads while these entries run. Native code has its own, and two that spin on one core are slow: where it does
        the products, what is left for torch is small."""
        if self.native is None:
            return self.threads
        hosted = (s for e in entries if (s := self.native.schedules.get(e)) is not None and self.native.hosts.get(e))
        return self.threads if any(not any(r.kernel.startswith("linear") for r in s.rows) for s in hosted) else 1

    @contextmanager
    def _threads(self, threads: int | None) -> Any:
        """Torch's threads for the time of a call (they are the process's: the last caller wins while calls overlap)."""
        if threads is None:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _callback(streamer: Any, prompts: list[list[int]]) -> loop.OnTokens | None:
    if streamer is None or not hasattr(streamer, "put"):
        if streamer is not None and not callable(streamer):
            raise BadInput(f"streamer: expected an object with put and end, or a function, got {type(streamer).__name__}")
        return streamer  # type: ignore[no-any-return]
    if len(prompts) != 1:
        raise BadInput(
            f"a streamer with put and end takes one sequence, got {len(prompts)}: use a function of (row, tokens, text)"
        )
    streamer.put(torch.tensor(prompts))

    def put(row: int, tokens: list[int], text: str) -> None:
        streamer.put(torch.tensor(tokens))

    return put
