"""All residual streams of a captured graph, for models of several: encoder and decoder, text and image.

A program has one stream; this says what else is there. Streams are found from the outputs back: through keys and values that come
from elsewhere (cross attention), and through what a stream begins with (image features among the tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from elision.errors import UnsupportedModel
from elision.frontend.capture import Captured, capture
from elision.frontend.inputs import examples
from elision.frontend.normalise import normalise
from elision.frontend.structure import Structure, attends, data_inputs, find_structure
from elision.frontend.taint import Taint


@dataclass(frozen=True, eq=False)
class Stream:
    """A stream, the inputs that it begins with, and the number of its attention sites that read another stream."""

    structure: Structure
    inputs: tuple[str, ...]
    cross: int

    def __str__(self) -> str:
        found = self.structure
        blocks = f"{_count(len(found.segments), 'block')} of {_count(found.templates, 'template')}"
        text = f"{_count(found.layers, 'layer')} ({blocks}) from {' and '.join(self.inputs)}"
        return f"{text}, where {_count(self.cross, 'block')} attend to another stream" if self.cross else text


def find_streams(graph: fx.Graph, taint: Taint) -> list[Stream]:
    """The streams of a normalised graph, that of its first output first. Empty if there is none."""
    output = next(n for n in graph.nodes if n.op == "output")
    pending, tried, found = list(output.all_input_nodes), set(), list[Stream]()
    while pending:
        result = pending.pop(0)
        if result in tried or not taint.token(result) or result.op == "placeholder":
            continue
        tried.add(result)
        if any(result in s.structure.stream for s in found):
            continue
        try:
            structure = find_structure(graph, taint, result)
        except UnsupportedModel:
            pending += data_inputs(result)
            continue
        if any(structure.root is s.structure.root for s in found):
            continue
        own = {n for s in structure.segments for n in s.nodes} | set(structure.stream)
        before = _above(structure.root)
        read = [e for s in structure.segments for e in s.externals if taint.token(e) and e not in own and e not in before]
        inputs = tuple(n.name for n in sorted(before) if n.op == "placeholder" and taint.token(n))
        if any(attends(n) for s in structure.segments for n in s.nodes):
            sites = {n for s in structure.segments for n in s.nodes if attends(n) and set(n.all_input_nodes) & set(read)}
            found.append(Stream(structure, inputs, len(sites)))
        pending += read
        if any(attends(n) for n in before):
            pending += data_inputs(structure.root)
    return found


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _above(root: fx.Node) -> set[fx.Node]:
    found, stack = set[fx.Node](), [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += data_inputs(node)
    return found


def survey(model: nn.Module) -> list[Stream]:
    """The streams of a model, captured with every input that it reads. Raises BadInput if it cannot be captured."""
    captured = capture(model, example=examples(model)[-1])
    return streams_of(captured)


def streams_of(captured: Captured) -> list[Stream]:
    """The streams of a captured model."""
    graph = normalise(captured.graph)
    return find_streams(graph, Taint(graph, captured.kinds))


def told(name: str, streams: list[Stream]) -> str:
    """Why a model of several streams is not compiled, with what was found."""
    return (
        f"{name} cannot be raised: it has {len(streams)} streams: {'; '.join(map(str, streams))}. A program has one stream: "
        "compile a part of the model that has one, such as its image or text encoder"
    )
