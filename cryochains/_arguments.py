"""What users give to functions, checked in one place: by the annotations of the function itself.

`checked` goes before a function or method where users come in, `check_fields` into the
``__post_init__`` of a dataclass that they make. Both read the types in the signature. A name such
as `Count` or `Angstroms` is a type and what else has to hold, so that the signature says what is
allowed, and type checkers see an int or a float. What is refused is one ValueError:

    expected n_modes to be a whole number of 1 or more, got 'ten' (str); try n_modes=50

numpy's and torch's numbers are taken as Python's, lists as arrays where an array is wanted; True is
no number, and a number is not True or False. NaN and infinity are nowhere taken but where a kind
says so. Arguments that are left out cost nothing.
"""

import inspect
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Annotated, Any, ParamSpec, TypeAlias, TypeVar, Union, get_args, get_origin

import numpy as np
import torch

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")

# No file system has longer names and paths.
_LONGEST_NAME = 255
_LONGEST_PATH = 4095
# Characters of a value that a sentence shows.
_SHOWN_LENGTH = 60
# More than any count of particles, pixels or passes; less than what 32 bits hold.
_MOST = 2**31 - 1
# Å, more than any molecule or image is wide.
_WIDEST = 1e6
# Largest deviation of an element of R Rᵀ from that of a rotation.
_ROTATION_ERROR = 1e-2
# Where what is asked for comes from.
_SOURCES = {
    "CTF": "that of load_particles(path)",
    "Check": "check(model, particles)",
    "Dynamics": "model.dynamics",
    "Encoder": "train_encoder(model, train, validation)",
    "EndsComparison": "compare_ends(motions)",
    "HalvesComparison": "compare_halves(result)",
    "MapComparison": "compare_with_map(result)",
    "Model": "Model(structure, particles)",
    "Modes": "compute_modes(structure)",
    "ParticleStack": "load_particles(path)",
    "Population": "load_population(name), or that of a result",
    "PrincipalMotions": "compute_pca(result)",
    "ResidualEncoder": "inference.train_residual_encoder(result)",
    "Result": "refine(model, particles)",
    "Structure": "load_structure(path)",
}


@dataclass(frozen=True)
class _Kind:
    """What has to hold of a value besides its type: beside the type in an ``Annotated``.

    Attributes
    ----------
    words : str
        What is wanted, after "expected x to be".
    holds : callable
        Whether a value of the type is of this kind.
    example : str
        What to try where the argument has no default.
    finite : bool
        False also takes NaN and infinity, if `holds` does.
    """

    words: str
    holds: Callable[[Any], bool] = lambda value: True
    example: str = ""
    finite: bool = True


# For arguments that the function itself checks, and says more of.
BY_FUNCTION = _Kind("what the function asks for")

Count: TypeAlias = Annotated[
    int, _Kind("a whole number of 1 or more", lambda n: 1 <= n <= _MOST, "1000")
]
Ordinal: TypeAlias = Annotated[
    int, _Kind("a whole number of 0 or more", lambda n: 0 <= n <= _MOST, "0")
]
Seed: TypeAlias = Annotated[
    int, _Kind("a whole number from 0 to 2⁶³ − 1", lambda n: 0 <= n < 2**63, "0")
]
Positive: TypeAlias = Annotated[float, _Kind("a finite number above 0", lambda x: x > 0, "1.0")]
NotNegative: TypeAlias = Annotated[
    float, _Kind("a finite number of 0 or more", lambda x: x >= 0, "0.0")
]
Angstroms: TypeAlias = Annotated[
    float, _Kind("a number of Å above 0", lambda x: 0 < x <= _WIDEST, "2.0")
]
Share: TypeAlias = Annotated[float, _Kind("a share from 0 to 1", lambda x: 0 <= x <= 1, "0.1")]
Percent: TypeAlias = Annotated[
    float, _Kind("a number from 0 to 100", lambda x: 0 <= x <= 100, "95")
]
PositiveOrInfinite: TypeAlias = Annotated[
    float, _Kind("a number above 0, or math.inf", lambda x: x > 0, "math.inf", finite=False)
]
Decibels: TypeAlias = Annotated[
    float,
    _Kind(
        "a number of dB from -300 to 300, or math.inf for no noise",
        lambda x: abs(x) <= 300 or x == math.inf,
        "0.0",
        finite=False,
    ),
]
Point: TypeAlias = Annotated[
    Sequence[float] | np.ndarray,
    _Kind(
        "three finite numbers in Å",
        lambda xyz: np.shape(xyz) == (3,),
        "structure.coords.mean(0)",
    ),
]
Rotations: TypeAlias = Annotated[
    torch.Tensor,
    _Kind("rotations (n, 3, 3)", lambda r: _are_rotations(r), "particles.rotations"),
]
Volume: TypeAlias = Annotated[
    np.ndarray,
    _Kind(
        "a volume (z, y, x) of finite numbers",
        lambda volume: volume.ndim == 3 and volume.size > 0,
        "map.volume",
    ),
]
LatentRows: TypeAlias = Annotated[
    torch.Tensor,
    _Kind("latents (n, p), one row a conformation", lambda z: z.ndim == 2, "latents[None]"),
]
# Of measured numbers, some of which may be missing.
WITH_NAN = _Kind("an array of numbers", example="a numpy array of floats", finite=False)
# For functions that count which of them are not finite.
Latents: TypeAlias = Annotated[torch.Tensor, WITH_NAN]


def checked(function: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """The function, which refuses arguments that are not of the types in its signature.

    Examples
    --------
    >>> @checked
    ... def frames(n: Count = 11) -> int:
    ...     return n
    >>> frames(np.int64(3))
    3
    >>> frames(2.5)
    Traceback (most recent call last):
    ValueError: expected n to be a whole number of 1 or more, got 2.5 (float); try n=11
    """
    signature = inspect.signature(function)

    @wraps(function)
    def with_checks(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # Missing and unknown names: Python's own sentence.
            return function(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _taken(signature.parameters[name], value, function)
        return function(*bound.args, **bound.kwargs)

    return with_checks


def check_fields(made: Any) -> None:
    """Refuse what is not of the types that a dataclass gives its fields; for ``__post_init__``."""
    for field in fields(made):
        value = getattr(made, field.name)
        if field.name.startswith("_") or value is field.default:
            continue
        annotation: Any = field.type
        rule = _rule(annotation)
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        taken = value if rule is None else _fitting(rule, field.name, value, default)
        if taken is not value:
            object.__setattr__(made, field.name, taken)


def _are_rotations(matrices: torch.Tensor) -> bool:
    if matrices.ndim != 3 or matrices.shape[1:] != (3, 3):
        return False
    error = matrices @ matrices.mT - torch.eye(3).to(matrices)
    proper = torch.linalg.det(matrices.double()) > 0
    return bool((error.abs() < _ROTATION_ERROR).all()) and bool(proper.all())


# Of a value that is not of the kind.
_UNFIT = object()


@dataclass(frozen=True)
class _Rule:
    """How a value is taken: as it is, as Python's own type, or as `_UNFIT`."""

    words: str
    example: str
    take: Callable[[Any], Any]


_NONE = _Rule("None", "None", lambda value: None if value is None else _UNFIT)


def _taken(parameter: inspect.Parameter, value: Any, function: Callable) -> Any:
    annotation = parameter.annotation
    if value is parameter.default or parameter.name.startswith("_"):
        return value
    rule = None if annotation is inspect.Parameter.empty else _rule(annotation)
    if rule is None or parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return value
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return tuple(_fitting(rule, parameter.name, one, parameter.default) for one in value)
    return _fitting(rule, parameter.name, value, parameter.default)


def _fitting(rule: _Rule, name: str, value: Any, default: Any) -> Any:
    taken = rule.take(value)
    if taken is not _UNFIT:
        return taken
    example = rule.example
    if default is not inspect.Parameter.empty and default is not None:
        example = f"{name}={default!r}"
    raise ValueError(
        f"expected {name} to be {rule.words}, got {_got(value)}; try {example}"
    ) from None


@cache
def _rule(annotation: Any) -> _Rule | None:
    """Of a type; None where anything goes."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *kinds = get_args(annotation)
        return None if BY_FUNCTION in kinds else _narrowed(base, kinds)
    if origin in (Union, UnionType):
        return _any_of(get_args(annotation))
    if origin is tuple:
        return _tuple_of(get_args(annotation))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping_of(*get_args(annotation))
    if origin is not None and issubclass(origin, Sequence):
        return _sequence_of(get_args(annotation)[0])
    if annotation in (Any, object):
        return None
    if annotation is Mapping:
        return _mapping_of(Any, Any)
    return _simple_rule(annotation)


def _simple_rule(annotation: Any) -> _Rule:
    if annotation in (torch.Tensor, np.ndarray):
        return _array_rule((annotation,))
    known = {
        NoneType: _NONE,
        bool: _Rule("True or False", "True", _take_truth),
        int: _Rule("a whole number", "1", _take_whole),
        float: _Rule("a finite number", "1.0", _finite_only),
        str: _instance_of(str, "text", "a str"),
        os.PathLike: _Rule("a path", "a str or a pathlib.Path", _take_path),
    }
    if annotation in known:
        return known[annotation]
    return _instance_of(annotation)


def _instance_of(cls: type, words: str = "", example: str = "") -> _Rule:
    name = cls.__name__
    if getattr(cls, "_is_protocol", False):
        members = [member for member in vars(cls) if callable(getattr(cls, member))]
        public = [m for m in members if m.startswith("__") is False or m in _COLLECTION_METHODS]
        return _Rule(
            f"an object with {' and '.join(public)}",
            "None",
            lambda value: value if all(hasattr(value, member) for member in public) else _UNFIT,
        )
    words = words or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    source = example or _SOURCES.get(name, f"one made by {cls.__module__}")
    return _Rule(words, source, lambda value: value if isinstance(value, cls) else _UNFIT)


_COLLECTION_METHODS = ("__len__", "__getitem__")


def _narrowed(base: Any, kinds: Sequence[_Kind]) -> _Rule:
    """The rule of a type, and kinds that have to hold as well."""
    (kind,) = kinds
    if base is float and not kind.finite:
        rule: _Rule | None = _Rule(kind.words, kind.example, _take_number)
    elif not kind.finite:
        rule = _array_rule(get_args(base) or (base,), finite=False)
    else:
        rule = _rule(base)
    take = (lambda value: value) if rule is None else rule.take

    def narrow(value: Any) -> Any:
        taken = take(value)
        return taken if taken is not _UNFIT and kind.holds(taken) else _UNFIT

    return _Rule(kind.words, kind.example, narrow)


def _any_of(members: tuple) -> _Rule | None:
    """One of several: paths and arrays first, None last in words."""
    rules: list[_Rule | None] = []
    others = [member for member in members if member is not NoneType]
    if os.PathLike in others:
        others = [member for member in others if member not in (str, os.PathLike)]
        rules.append(_rule(os.PathLike))
    arrays = tuple(member for member in others if member in (torch.Tensor, np.ndarray))
    if arrays:
        rules.append(_array_rule(arrays))
        # Lists are taken as arrays.
        others = [
            member
            for member in others
            if member not in arrays and get_origin(member) is not Sequence
        ]
        others = [member for member in others if not _is_sequence(member)]
    rules += [_rule(member) for member in others]
    if NoneType in members:
        rules.append(_NONE)
    known = [rule for rule in rules if rule is not None]
    if len(known) < len(rules):
        return None

    def take(value: Any) -> Any:
        taken = (rule.take(value) for rule in known)
        return next((one for one in taken if one is not _UNFIT), _UNFIT)

    # That it may be left out is of no use to who gave something.
    words = [rule.words for rule in known if rule is not _NONE]
    for number, one in enumerate(words[1:], start=1):
        if one == f"a list, each {words[number - 1]}":
            words[number] = "a list of such"
    return _Rule(", or ".join(words), known[0].example, take)


def _is_sequence(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not tuple


def _tuple_of(members: tuple) -> _Rule | None:
    rules = [_rule(member) for member in members]
    words = f"{len(rules)} values, each {rules[0].words if rules[0] else 'anything'}"

    def take(value: Any) -> Any:
        if isinstance(value, (str, bytes, Mapping, set)) or not hasattr(value, "__len__"):
            return _UNFIT
        if len(value) != len(rules):
            return _UNFIT
        pairs = zip(rules, value, strict=True)
        taken = tuple(one if rule is None else rule.take(one) for rule, one in pairs)
        return _UNFIT if any(one is _UNFIT for one in taken) else taken

    return _Rule(words, "two of them", take)


def _sequence_of(member: Any) -> _Rule:
    rule = _rule(member)
    words = f"a list, each {rule.words}" if rule else "a list"

    def take(value: Any) -> Any:
        if isinstance(value, (str, bytes, Mapping, set)) or not hasattr(value, "__len__"):
            return _UNFIT
        if getattr(value, "ndim", 1) != 1 or not hasattr(value, "__getitem__"):
            return _UNFIT
        if rule is None:
            return value
        taken = [rule.take(one) for one in value]
        return _UNFIT if any(one is _UNFIT for one in taken) else taken

    return _Rule(words, f"[{rule.example}]" if rule else "a list", take)


def _mapping_of(key: Any, member: Any) -> _Rule:
    """Of dicts, and tables that have columns by name."""
    rules = (_rule(key), _rule(member))
    words = "a mapping such as a dict"
    if rules[1] is not None:
        words += f", each value {rules[1].words}"

    def take(value: Any) -> Any:
        if not hasattr(value, "keys") or not hasattr(value, "__getitem__"):
            return _UNFIT
        if rules[1] is None:
            return value
        pairs = [(one, value[one]) for one in value.keys()]
        taken = [
            [one if rule is None else rule.take(one) for rule, one in zip(rules, pair, strict=True)]
            for pair in pairs
        ]
        return _UNFIT if any(one is _UNFIT for pair in taken for one in pair) else dict(taken)

    return _Rule(words, "a dict", take)


def _take_truth(value: Any) -> Any:
    return bool(value) if isinstance(value, (bool, np.bool_)) else _UNFIT


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) in (np.bool_, torch.bool)


def _take_whole(value: Any) -> Any:
    if type(value) is int:
        return value
    # A tensor of one number knows how to be an index, whatever its shape.
    if _is_truth(value) or getattr(value, "ndim", 0) != 0:
        return _UNFIT
    try:
        return operator.index(value)
    except TypeError:
        return _UNFIT


def _take_number(value: Any) -> Any:
    if type(value) in (int, float):
        return value
    is_number = isinstance(value, (int, float, np.integer, np.floating, np.ndarray, torch.Tensor))
    if not is_number or _is_truth(value) or getattr(value, "ndim", 0) != 0:
        return _UNFIT
    kind = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value).dtype.kind
    return value.item() if kind in "iuf" and hasattr(value, "item") else _UNFIT


def _finite_only(value: Any) -> Any:
    taken = _take_number(value)
    if taken is _UNFIT:
        return _UNFIT
    try:
        return taken if math.isfinite(taken) else _UNFIT
    except OverflowError:  # an int that no float holds
        return _UNFIT


def _take_path(value: Any) -> Any:
    if not isinstance(value, (str, os.PathLike)):
        return _UNFIT
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        return _UNFIT
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        return _UNFIT
    longest = max(map(len, data.split(os.fsencode(os.sep))))
    return value if longest <= _LONGEST_NAME and len(data) <= _LONGEST_PATH else _UNFIT


def _array_rule(wanted: tuple, finite: bool = True) -> _Rule:
    """Arrays, tensors and lists of real numbers, as the first of the types that is wanted."""

    def take(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            value = _as_numbers(value)
        if value is _UNFIT or value.dtype in _NOT_REAL or (finite and not _all_finite(value)):
            return _UNFIT
        if isinstance(value, wanted):
            return value
        if wanted[0] is np.ndarray:
            return value.detach().cpu().numpy()
        tensor = torch.as_tensor(value)
        return tensor if tensor.dtype.is_floating_point else tensor.float()

    words = "an array of finite numbers" if finite else "an array of numbers"
    return _Rule(words, "a numpy array of floats", take)


_NOT_REAL = (torch.complex32, torch.complex64, torch.complex128)


def _as_numbers(value: Any) -> Any:
    if not isinstance(value, (list, tuple, range)) and not hasattr(value, "__array__"):
        return _UNFIT
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists
        return _UNFIT
    return array if array.dtype.kind in "iufb" else _UNFIT


def _all_finite(array: np.ndarray | torch.Tensor) -> bool:
    # A sum holds every NaN and needs no copy; one that is too large may still be of finite numbers.
    if isinstance(array, torch.Tensor):
        return bool(array.detach().sum().isfinite()) or bool(array.isfinite().all())
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def _got(value: Any) -> str:
    """A value in a few words of one line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    shape: Any = getattr(value, "shape", None)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        words = f"{name} {tuple(value.shape)} of {value.dtype}"
        is_real = value.dtype not in _NOT_REAL and getattr(value.dtype, "kind", "f") == "f"
        return words if not is_real or _all_finite(value) else f"{words} with NaN or infinity"
    if value is None or shape is not None:
        return str(value) if value is None else f"{name} {tuple(shape)}"
    if not isinstance(value, (str, bytes, bool, int, float, complex, list, tuple, dict, set)):
        return f"a value of type {name}"
    if isinstance(value, int) and abs(value) > 10**_SHOWN_LENGTH:
        return "a number of more than 60 digits (int)"
    text = " ".join(repr(value).split())
    if len(text) > _SHOWN_LENGTH:
        text = f"{text[:_SHOWN_LENGTH]}…"
    return f"{text} ({name})"
