"""What is taken of each kind, and the sentence of what is not; by function: test_bad_input.py."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pytest
import torch

from cryochains._arguments import (
    BY_FUNCTION,
    Angstroms,
    Count,
    Latents,
    Point,
    check_fields,
    checked,
)

PACKAGES = ("molecule", "images", "model", "inference", "analysis", "view")


def taken(annotation, value):
    """What a function gets for an argument of this type."""

    def function(x):
        return x

    function.__annotations__["x"] = annotation
    return checked(function)(value)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, np.int8(3), 3),
        (int, np.array(3), 3),
        (int, torch.tensor(3), 3),
        (int, -3, -3),
        (float, np.float32(0.5), 0.5),
        (float, torch.tensor(0.5), 0.5),
        (float, 2, 2),
        (bool, np.bool_(False), False),
        (str | None, None, None),
        (tuple[float, float], [1, np.float64(2.0)], (1, 2.0)),
        (Sequence[Count], np.array([1, 2]), [1, 2]),
        (Mapping[str, float], {"a": np.float64(1.0)}, {"a": 1.0}),
        (Point, (0, 1, 2), (0, 1, 2)),
        (Annotated[int, BY_FUNCTION], "anything", "anything"),
        (Any, object, object),
    ],
)
def test_numbers_are_pythons_own(annotation, value, expected):
    got = taken(annotation, value)
    if annotation is Point:
        assert np.array_equal(got, expected)
    else:
        assert got == expected and type(got) is type(expected)


def test_arrays_and_tensors():
    tensor = taken(torch.Tensor, [[1, 2]])
    assert tensor.dtype == torch.float32 and tensor.shape == (1, 2)
    assert taken(torch.Tensor, np.ones(2)).dtype == torch.float64
    assert isinstance(taken(np.ndarray, torch.ones(2)), np.ndarray)
    given = torch.ones(2, requires_grad=True)
    assert taken(torch.Tensor, given) is given, "neither copied nor detached"
    assert taken(Latents, torch.tensor([math.nan])).isnan().all()
    # A sum that no float32 holds, of numbers that all are finite.
    assert taken(np.ndarray, np.full(2, 3e38, dtype=np.float32)).shape == (2,)


@pytest.mark.parametrize(
    ("annotation", "value", "sentence"),
    [
        (Count, "ten", "a whole number of 1 or more, got 'ten' (str); try 1000"),
        (Count, True, "a whole number of 1 or more, got True (bool); try 1000"),
        (int, 2.0, "a whole number, got 2.0 (float); try 1"),
        (Angstroms | None, math.nan, "a number of Å above 0, got nan (float); try 2.0"),
        (
            Count | Sequence[Count],
            [1, 0],
            "a whole number of 1 or more, or a list of such, got [1, 0] (list); try 1000",
        ),
        (
            np.ndarray,
            np.array([math.nan]),
            "an array of finite numbers, got ndarray (1,) of float64 with NaN or infinity; "
            "try a numpy array of floats",
        ),
        (str, None, "text, got None; try a str"),
        (bool, 1, "True or False, got 1 (int); try True"),
        (Path, Path, "a Path, got the class Path; try one made by pathlib"),
        (int, 10**80, None),
        (
            Count,
            "x" * 100,
            f"a whole number of 1 or more, got '{'x' * 59}… (str); try 1000",
        ),
        (Count, "a\n\tb", r"a whole number of 1 or more, got 'a\n\tb' (str); try 1000"),
    ],
)
def test_one_sentence(annotation, value, sentence):
    if sentence is None:
        assert taken(annotation, value) == value
        return
    with pytest.raises(ValueError) as caught:
        taken(annotation, value)
    assert str(caught.value) == f"expected x to be {sentence}"


def test_the_default_is_what_to_try():
    @checked
    def frames(n: Count = 11, *, name: str | None = None) -> int:
        return n

    with pytest.raises(ValueError, match="got 0 .*; try n=11$"):
        frames(0)
    with pytest.raises(ValueError, match="expected name to be text, got 3 .*; try a str$"):
        frames(name=3)
    assert frames() == 11 and frames(name=None) == 11


def test_several_of_one_kind():
    @checked
    def joined(*names: str, **others: Any) -> str:
        return "".join(names)

    assert joined("a", "b", other=1) == "ab"
    with pytest.raises(ValueError, match="expected names to be text, got 3"):
        joined("a", 3)


class Walks(Protocol):
    def walk(self) -> None: ...


def test_a_protocol_is_what_has_its_methods():
    class Walker:
        def walk(self):
            pass

    assert isinstance(taken(Walks | None, Walker()), Walker)
    with pytest.raises(ValueError, match="expected x to be an object with walk, got 3"):
        taken(Walks | None, 3)


def test_fields_of_a_dataclass():
    @dataclass(frozen=True)
    class Range:
        low: Angstroms
        n: Count = 5
        _hidden: Any = None

        def __post_init__(self) -> None:
            check_fields(self)

    assert Range(np.float64(2.0)).low == 2.0 and type(Range(np.float64(2.0)).low) is float
    with pytest.raises(ValueError, match="expected n to be .*, got 0 .*; try n=5"):
        Range(2.0, 0)
    with pytest.raises(ValueError, match="expected low to be a number of Å above 0, got -1"):
        Range(-1)


def test_what_a_function_is_called_and_takes_stays():
    @checked
    def turn(angle: float, *, about: str = "z") -> float:
        """The angle."""
        return angle

    assert turn.__name__ == "turn" and turn.__doc__ == "The angle."
    assert list(inspect.signature(turn).parameters) == ["angle", "about"]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'angle'"):
        turn()
    with pytest.raises(TypeError, match="unexpected keyword argument 'round'"):
        turn(1.0, round="x")


def boundary():
    """Every function, and method of a class, that is checked."""
    for package in PACKAGES:
        module = import_module(f"cryochains.{package}")
        for name in module.__all__:
            one = getattr(module, name)
            members = vars(one) if inspect.isclass(one) else {name: one}
            for own, function in members.items():
                if hasattr(function, "__wrapped__") and inspect.isfunction(function):
                    yield f"{package}.{name}.{own}", function


def test_types_at_the_boundary_are_types_and_no_texts():
    found = dict(boundary())
    assert len(found) > 50
    for name, function in found.items():
        for parameter in inspect.signature(function).parameters.values():
            assert not isinstance(parameter.annotation, str), f"{name}({parameter.name})"


def test_what_users_call_is_checked():
    cryochains = import_module("cryochains")
    for name in cryochains.__all__:
        one = getattr(cryochains, name)
        if inspect.isfunction(one):
            assert hasattr(one, "__wrapped__"), name
    for name, function in vars(cryochains.plots).items():
        if name.startswith("plot_"):
            assert hasattr(function, "__wrapped__"), name
