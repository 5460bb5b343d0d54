"""Every registered pass as text: what it prints is read back as the same pass, and a misspelt text is helped."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_llama

from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.passes import REGISTRY, SkipLayers, from_text
from elision.passes.pipeline import run

VALUES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(10**9), 10**9),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.from_regex(r"[A-Za-z0-9_.:/-]{1,12}", fullmatch=True),
    float | str: st.floats(allow_nan=False, allow_infinity=False) | st.from_regex(r"[a-z]{1,12}", fullmatch=True),
    int | str: st.integers(-(10**9), 10**9) | st.from_regex(r"[a-z]{1,12}", fullmatch=True),
    tuple[int, ...]: st.lists(st.integers(0, 99), max_size=8).map(tuple),
}


@st.composite
def passes(draw: st.DrawFn) -> Any:
    cls = REGISTRY[draw(st.sampled_from(sorted(REGISTRY)))]
    hints = get_type_hints(cls)
    values = {f.name: draw(VALUES[hints[f.name]]) for f in dataclasses.fields(cls) if draw(st.booleans())}
    needed = {f.name: draw(VALUES[hints[f.name]]) for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    return cls(**{**needed, **values})


@given(passes())
def test_text_round_trip(step: Any) -> None:
    assert from_text(step.text()) == step


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_names_and_fields_one_letter_off_are_helped(name: str) -> None:
    with pytest.raises(BadInput, match=f"did you mean '{name}'.*the passes are {', '.join(sorted(REGISTRY))}"):
        from_text(f"{name}s")
    for field in dataclasses.fields(REGISTRY[name]):
        with pytest.raises(BadInput, match=f"pass {name} has no field '{field.name}s'.*did you mean '{field.name}'"):
            from_text(f"{name}:{field.name}s=1")


@pytest.mark.parametrize("layers", [3, "3", [3], ("3",), (1.0,), (True,), None])
def test_objects_are_checked_like_texts(layers: Any) -> None:
    with pytest.raises(BadInput, match=r"pass skip-layers: layers=.* is not of the expected type \(numbers such as 3\+7-9\)"):
        SkipLayers(layers)


def test_a_layer_named_twice_is_left_out_once() -> None:
    for half in ("", "mlp"):
        once, twice = (run(tiny_llama()[0], [SkipLayers(layers, half)]) for layers in ((1,), (1, 1)))
        assert canonical(once) == canonical(twice)


def test_the_registry_is_of_documented_frozen_passes() -> None:
    for name, cls in REGISTRY.items():
        assert cls.name == name and cls.__doc__ and cls.quality in ("exact", "distribution", "approximate")
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        fields = {f.name for f in dataclasses.fields(cls)}
        assert all(f"``{field}``" in cls.__doc__ for field in fields), f"{name}: a field without a word of documentation"
