"""The errors of the engine.

An exception that is raised *inside* an operator keeps its type and is not wrapped; it gains a note that
tells which node raised it. The classes here are for mistakes in building or using a model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ModelError(Exception):
    """Something is wrong with a model, or with how it is used."""


class BadArgument(ModelError):
    """An argument that was not declared, was given twice, or does not fit."""


class WrongKind(BadArgument, TypeError):
    """An argument of a kind that has no meaning here."""


class MissingArgument(ModelError):
    """A declared argument was not given."""


class NoValueYet(ModelError, TypeError):
    """A symbol was used as if it had its value already, while the model is built."""


class UnpackError(NoValueYet):
    """One symbol was taken for several."""


class OverwritePrecaution(ModelError):
    """A symbol that already has a value was given as a place for a new one."""


class InferError(ModelError):
    """Symbols of different models met in one operator."""


class DuplicatedOutput(ModelError):
    """Two outputs of a model were given the same name."""


class UnexpectedOutput(ModelError):
    """An output was asked for that the model does not have."""


class ResolveError(ModelError):
    """A value was needed that was not given."""


class PlacementError(ModelError):
    """A value is used where it does not live: a summand of each rank for the sum, the root's value elsewhere."""


class BrokenPrimitive(ModelError):
    """An operator lacks a function that is needed, or its functions do not fit each other."""


class ExecutionError(ModelError):
    """The function of an operator did not return what the operator declares."""

    def __init__(self, message: str, reason: BaseException | None = None) -> None:
        super().__init__(message)
        self.reason = reason


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that ends an error message: the closest of the `known` names, or all of them."""
    from difflib import get_close_matches

    known = list(known)
    close = get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(map(repr, known)) or 'none'}"


class MissingExtra(ModuleNotFoundError):
    """A package that an extra of the installation brings is not installed."""


@contextmanager
def needed_for(purpose: str, extra: str) -> Iterator[None]:
    """Imports in this context are needed for `purpose`, and come with the `extra`.

    Raises
    ------
    MissingExtra
        if a package is not found; the message names the package, the purpose, and the command that installs
        it. What goes wrong inside a package that is there stays as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingExtra) or package == "vmad_lit":
            raise
        # Say what to install
        message = f"{package} is needed for {purpose} and is not installed: pip install 'vmad_lit[{extra}]'"
        if extra == "mesh":
            message += " (with pfft-python, which pip finds only in this project: README.md, Installing)"
        raise MissingExtra(message, name=error.name) from None


class Disagreement(ModelError, ValueError):
    """Ranks that should do the same are at different places of the program, or have built different models."""


class LeftAlone(ModelError):
    """A rank has waited in vain for others."""
