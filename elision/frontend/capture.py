"""A PyTorch model becomes an FX graph of ``aten`` operators, with its weights beside it (torch.export).

The user's model is never touched: the export runs on a copy that shares its parameters.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from elision.errors import BadInput, UnsupportedModel
from elision.frontend import huggingface, inputs
from elision.frontend.attention import ATTENTION
from elision.frontend.normalise import operator_name

#: What user inputs of these names are; others are tokens.
_KINDS: dict[str, Kind] = {"position_ids": "position", "attention_mask": "valid"}
Kind = Literal["param", "const", "token", "position", "valid"]


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured model.

    ``graph``: its placeholders are weights and inputs, its output is the flat list of output values.
    ``params``: parameters, buffers and constants by fully qualified name; tied weights are there once.
    ``source``: placeholder name to the name in ``params``.
    ``kinds``: placeholder name to ``param`` (weight), ``const`` (buffer, constant), ``token`` (user input
    whose values are the data), ``position`` or ``valid`` (which tokens are there and which are padding).
    ``inputs``, ``outputs``: names of user inputs and of outputs, in order (``logits``).
    """

    graph: fx.Graph
    params: dict[str, Tensor]
    source: dict[str, str]
    kinds: dict[str, Kind]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def longest(self) -> int:
        """The longest text that the graph is valid for: a model may slice its mask from a table."""
        ids = next(n for n in self.graph.nodes if n.op == "placeholder" and n.name in self.inputs)
        length: Any = ids.meta["val"].shape[1] if ids.meta["val"].dim() == 2 else sys.maxsize
        if isinstance(length, int):
            return length
        known = length.node.shape_env.var_to_range.get(length.node.expr)
        return int(known.upper) if known is not None and known.upper < sys.maxsize else sys.maxsize

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Execute the graph with torch on the given user inputs; returns the outputs by name."""
        if set(inputs) != set(self.inputs):
            raise BadInput(f"inputs {sorted(inputs)} were given, expected exactly {sorted(self.inputs)}")
        values = [
            self.params[self.source[node.name]] if node.name in self.source else inputs.get(node.name)
            for node in self.graph.nodes
            if node.op == "placeholder"
        ]
        with torch.no_grad():
            results = fx.Interpreter(fx.GraphModule(nn.Module(), self.graph)).run(*values)
        return dict(zip(self.outputs, results, strict=True))


def capture(model: nn.Module, *, example: Mapping[str, Any] | tuple[Any, ...] | None = None) -> Captured:
    """Export ``model`` (in evaluation mode) with dynamic batch and length, without in-place operators.

    ``example``: example inputs, keyword (mapping) or positional (tuple). Not needed for models of
    ``transformers``: these are exported without a cache, with explicit positions and, where a token sees later
    ones, with an explicit ``attention_mask`` and token types (`elision.frontend.inputs`); attention is one operator
    (``elision.frontend.attention``) if the model, run on the example, still gives the same result; a model with its
    own attention code keeps it. Raises ``BadInput`` if examples are
    needed and missing, and ``UnsupportedModel`` if torch.export refuses the model.
    """
    private = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    if not huggingface.recognises(model):
        example = _token_ids(model) if example is None else example
        if example is None:
            raise BadInput(
                f"{type(model).__name__} was given without example inputs; a plain nn.Module is traced by running it once, "
                "so its forward must take token ids alone, or pass example=(tensor, ...) to capture"
            )
        args, kwargs = (example, {}) if isinstance(example, tuple) else ((), dict(example))
        return _export(private, args, kwargs, Dim.AUTO)
    if isinstance(example, tuple):
        example = dict(zip(inspect.signature(model.forward).parameters, example, strict=False))
    kwargs, expected = _run(private, [dict(example)] if example else inputs.examples(private))
    # Inputs of several kinds may have sizes that depend on one another (image tokens in a text, and images).
    dynamic = Dim.AUTO if {"input_ids", "pixel_values"} <= set(kwargs) else Dim.DYNAMIC
    with huggingface.one_attention(private):
        captured = _export(private, (), kwargs, dynamic)
    # Without a site of its own, the other implementation only made the model take another way than the one it was given for.
    if not any(n.target is ATTENTION for n in captured.graph.nodes) or not _agrees(captured, kwargs, expected):
        captured = _export(private, (), kwargs, dynamic)
        if not _agrees(captured, kwargs, expected):
            raise UnsupportedModel(
                f"the exported graph of {type(model).__name__} does not reproduce the model's own outputs; "
                "the model depends on something besides its inputs and weights"
            )
    return captured


def _run(model: nn.Module, examples: list[dict[str, Any]]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The first of the examples that the model runs on, with what it assumes made explicit, and its outputs."""
    for kwargs in examples:
        kwargs |= inputs.without_cache(model)
        try:
            with torch.no_grad(), huggingface.plain_experts(model):
                expected = model(**kwargs)
                if not isinstance(expected, Mapping):
                    kind = type(expected).__name__
                    raise TypeError(f"its forward returns a {kind}, which does not name its values; expected a ModelOutput")
                return kwargs | inputs.assumed(model, kwargs, expected, _same), expected
        except Exception as error:  # whatever the model's own code raises
            reason, cause = next(iter(str(error).strip().splitlines()), type(error).__name__), error
    raise UnsupportedModel(
        f"{type(model).__name__} does not run on {', '.join(examples[-1])}: {reason} "
        "(a model that needs other inputs cannot be compiled)"
    ) from cause


def _token_ids(model: nn.Module) -> tuple[Tensor] | None:
    """Token ids ``[2, 12]`` for a module that embeds the one thing that its forward must be given; else None."""
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    given = [p for p in inspect.signature(model.forward).parameters.values() if p.default is inspect.Parameter.empty]
    if table is None or len(given) != 1 or given[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return None
    return ((torch.arange(24) % table.num_embeddings).reshape(2, 12).to(table.weight.device),)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Captured:
    given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    shapes = {name: pytree.tree_map(lambda x: _dims(x, dynamic), value) for name, value in given.items()}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:  # torch.export raises many unrelated types for models that it cannot trace
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be traced with dynamic batch and length: {reason} "
            "(control flow that depends on values, dynamic RoPE for example, must be made static)"
        ) from error
    return _captured(program)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and prints whole graphs before it raises; the error says what the user needs."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _dims(value: Any, dynamic: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    # Batch varies, and the length of integer inputs (tokens); Dim.AUTO lets torch.export keep what is fixed.
    varying = value.dim() if dynamic is Dim.AUTO or not value.is_floating_point() else min(value.dim(), 1)
    return dict.fromkeys(range(varying), dynamic)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and bool(node.all_input_nodes)


def _agrees(captured: Captured, kwargs: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """The outputs are equal up to rounding. With experts, only most of their rows need be: a rounding may flip an expert."""
    found = captured.run(**{name: kwargs[name] for name in captured.inputs})
    return _same(found, expected, routed=any(operator_name(node) == "aten::topk" for node in captured.graph.nodes))


def _same(found: Mapping[str, Any], expected: Mapping[str, Any], routed: bool = False) -> bool:
    """The tensors of ``found`` are those of ``expected`` up to rounding (``routed``: most of their rows)."""
    for name, value in found.items():
        if name not in expected or not isinstance(expected[name], Tensor) or not isinstance(value, Tensor):
            continue
        want = expected[name].double()
        error = (value.double() - want).abs().amax(-1) / want.abs().amax(-1).clamp(min=1e-30)
        tolerance = 1e-3 if torch.finfo(expected[name].dtype).bits >= 32 else 0.1
        if not float(error.median() if routed else error.max()) <= tolerance:
            return False
    return True


def _captured(program: ExportedProgram) -> Captured:
    signature = program.graph_signature
    kinds: dict[str, Kind] = {}
    source: dict[str, str] = {}
    inputs: list[str] = []
    graph = fx.Graph()
    flat: Any = graph.graph_copy(program.graph, {})
    names = [n.name for n in graph.nodes if n.op == "placeholder"]  # a copy renames what shadows a builtin
    for spec, name in zip(signature.input_specs, names, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                kinds[name] = _KINDS.get(name, "token")
                inputs.append(name)
        elif spec.target is not None:
            kinds[name] = "param" if spec.kind == InputKind.PARAMETER else "const"
            source[name] = spec.target
    values = [
        value
        for spec, value in zip(signature.output_specs, flat, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT  # the rest writes buffers back
    ]
    outputs = [p for p in zip(_output_names(program), values, strict=True) if isinstance(p[1], fx.Node)]
    outputs = [p for p in outputs if p[0] == "logits"] or outputs
    graph.output([value for _, value in outputs])
    graph.eliminate_dead_code()
    stored = {**program.state_dict, **program.constants}
    _merge_tied(graph, source, stored)
    params = {name: stored[name].detach() for name in dict.fromkeys(source.values())}
    return Captured(graph, params, source, kinds, tuple(inputs), tuple(name for name, _ in outputs))


def _output_names(program: ExportedProgram) -> list[str]:
    spec = program.call_spec.out_spec
    if spec is None:
        raise UnsupportedModel("the exported program has no output")
    names = []
    for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten([0] * spec.num_leaves, spec))[0]:
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        names.append(".".join(parts) or "output")
    return names


def _merge_tied(graph: fx.Graph, source: dict[str, str], stored: Mapping[str, Tensor]) -> None:
    """Placeholders that read the same memory become one; placeholders of weights without a reader go away."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "placeholder" or node.name not in source:
            continue
        tensor = stored[source[node.name]]
        if node.users and isinstance(tensor, Tensor) and tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            owner = first.setdefault(key, node)
            if owner is not node:
                node.replace_all_uses_with(owner)
        if not node.users:
            graph.erase_node(node)
            del source[node.name]
