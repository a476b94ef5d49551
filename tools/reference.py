"""What a package offers: its names, where they are defined, and how they are described.

Sources are read as syntax trees, so that a signature shows types as the chapter writes them, and a name that a module
takes over from another is known as the other's.  The modules are imported as well, since an operator knows best what it
can do.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin


@dataclass(frozen=True)
class Source:
    """A module as it is written."""

    name: str
    file: str
    lines: tuple[str, ...]
    tree: ast.Module
    imports: dict[str, tuple[str, str]]  # from a name to the module it comes from, and its name there


@cache
def source(module: str) -> Source:
    file = inspect.getsourcefile(importlib.import_module(module)) or ""
    text = Path(file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = module.split(".") if file.endswith("__init__.py") else module.split(".")[:-1]
    imports = {}
    inner = [
        part for node in tree.body if isinstance(node, (ast.If, ast.With, ast.Try)) for part in node.body
    ]
    for node in [*tree.body, *inner]:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            imports |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return Source(module, file, tuple(text.splitlines()), tree, imports)


@cache
def home(module: str, name: str) -> tuple[str, str] | None:
    """The module that defines what another one has under a name, and the name there; None for what is not Python of ours."""
    top = module.split(".")[0]
    for _ in range(10):
        if definition(module, name) is not None:
            return module, name
        if name not in source(module).imports:
            return None
        module, name = source(module).imports[name]
        if module.split(".")[0] != top:
            return None
    return None


@cache
def definition(module: str, fullname: str) -> Any:
    """The statement in the source of a module that defines a name such as ``Model.compute``, or None."""
    first, *parts = fullname.split(".")
    node: Any = bindings(module).get(first)
    for part in parts:
        body = getattr(node, "body", [])
        node = next((child for child in body if part in names_bound(child)), None)
    return node


@cache
def bindings(module: str) -> dict[str, Any]:
    """The statement of a module that binds each name, the outermost and first one that does."""
    found: dict[str, Any] = {}
    for node in ast.walk(source(module).tree):
        for name in names_bound(node):
            found.setdefault(name, node)
    return found


def names_bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    return []


@dataclass(frozen=True)
class Member:
    """A name that a module defines for others."""

    module: str
    name: str
    kind: str  # "class", "exception", "operator", "function", "data", "type", or "alias" of another name
    value: Any = field(compare=False)
    words: str = ""  # the comment beside a constant or the name of a type; of an alias, what it stands for


@cache
def members(module: str) -> tuple[Member, ...]:
    """The public names that a module defines itself, in the order of its source."""
    found: dict[str, Member] = {}
    chosen = getattr(importlib.import_module(module), "__all__", None)
    for node in source(module).tree.body:
        for name in names_bound(node):
            if name.startswith("_") or name in found:
                continue
            member = describe(module, name, node)
            if member is not None and (chosen is None or name in chosen or member.kind == "type"):
                found[name] = member
    return tuple(found.values())


def describe(module: str, name: str, node: ast.AST) -> Member | None:
    """What a statement makes of a name: None if it is nobody else's business."""
    value = getattr(importlib.import_module(module), name, None)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return Member(module, name, kind_of(value), value)
    words = remark(module, node)
    if isinstance(value, TypeVar) or not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return None
    if isinstance(node.value, ast.Name) and home(module, node.value.id) == (module, node.value.id):
        return Member(module, name, "alias", value, node.value.id)
    if is_type(value, node):
        return Member(module, name, "type", value, words)
    if is_operator(value) or (isinstance(value, type) and value.__module__ == module):
        return Member(module, name, kind_of(value), value)
    if words or (module, name) in handed_on(module.split(".")[0]):
        return Member(module, name, "data", value, words)
    return None


@cache
def handed_on(package: str) -> frozenset[tuple[str, str]]:
    """What the modules of a package offer by ``__all__``, each where it is defined."""
    init = Path(source(package).file)
    found = set()
    for path in init.parent.rglob("*.py") if init.name == "__init__.py" else []:
        parts = [package, *path.relative_to(init.parent).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] != "__main__":
            chosen = getattr(importlib.import_module(module), "__all__", ())
            found |= {home(module, name) for name in chosen}
    return frozenset(place for place in found if place is not None)


def kind_of(value: Any) -> str:
    if isinstance(value, type):
        return "exception" if issubclass(value, BaseException) else "class"
    return "operator" if is_operator(value) else "function"


def is_operator(value: Any) -> bool:
    """Whether a value is an operator: a primitive tells its arguments."""
    return not isinstance(value, type) and isinstance(
        getattr(getattr(value, "apl", None), "argnames", None), tuple
    )


def is_type(value: Any, node: ast.Assign | ast.AnnAssign) -> bool:
    """Whether a name stands for a type, such as ``Names = str | list[str]``."""
    annotation = getattr(node, "annotation", None)
    if annotation is not None:
        return "TypeAlias" in ast.unparse(annotation)
    written = isinstance(node.value, (ast.Name, ast.Attribute, ast.Subscript, ast.BinOp))
    return written and (
        value is Any
        or get_origin(value) is not None
        or (isinstance(value, type) and value.__module__ != "numpy.random")
    )


def remark(module: str, node: Any) -> str:
    """The comment behind a statement, or above it after ``#:``, as a sentence."""
    lines = source(module).lines
    words = ""
    if node.lineno == node.end_lineno:
        words = lines[node.lineno - 1].encode()[node.end_col_offset :].decode().partition("#")[2]
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("#"):
            break
        above.insert(0, line.lstrip("#: "))
    words = (words or " ".join(above)).strip().removeprefix("noqa")
    if words.startswith((":", "type:")):
        words = ""
    return words and words[0].upper() + words[1:] + ("" if words.endswith((".", "?", "!")) else ".")


def docstring(member: Member) -> str:
    """What a name has to say for itself; nothing if only its type has something to say."""
    if member.kind in ("data", "type"):
        return member.words
    if member.kind == "alias":
        return f"Another name of `{member.words}`."
    doc = inspect.getdoc(member.value) or ""
    own = getattr(member.value, "__doc__", None)
    inherited = not isinstance(member.value, type) and own == type(member.value).__doc__
    generated = isinstance(member.value, type) and doc.startswith(f"{member.name}(")  # of a namedtuple
    return "" if inherited or generated or doc in OF_BUILTINS else doc


#: What the types of Python say of themselves.
OF_BUILTINS = {kind.__doc__ for kind in vars(builtins).values() if isinstance(kind, type)}


def summary(doc: str) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    found = re.match(r".*?(?:(?<!e\.g)(?<!i\.e)[.](?=\s|$)|$)", paragraph)
    return (found[0] if found else paragraph).strip()


# -- Signatures ---------------------------------------------------------------------------------------------


def signature(member: Member) -> str:
    """The arguments of a function, class or operator, with types as the source writes them."""
    node = definition(member.module, member.name)
    if member.kind == "operator":
        return signature_of_operator(member.value, node)
    if isinstance(node, ast.FunctionDef):
        return arguments(node)
    try:
        found = inspect.signature(member.value)
    except (TypeError, ValueError):
        return "()"
    return without_addresses(
        str(
            found.replace(
                parameters=[
                    parameter.replace(annotation=Written.of(parameter.annotation, parameter.empty))
                    for parameter in found.parameters.values()
                ],
                return_annotation=found.empty,
            )
        )
    )


class Written:
    """A type that is shown as it was written, without quotes."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __repr__(self) -> str:
        return self.words

    @classmethod
    def of(cls, annotation: Any, empty: Any) -> Any:
        if annotation is empty:
            return empty
        return cls(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def arguments(node: ast.FunctionDef, bound: bool = False) -> str:
    """The parameters and the result of a function; without the first one if it is bound."""
    given = node.args
    if bound and (given.posonlyargs or given.args):
        some, others = (given.posonlyargs[1:], given.args) if given.posonlyargs else ([], given.args[1:])
        kept = len(some) + len(others)
        given = ast.arguments(
            **{
                **vars(given),
                "posonlyargs": some,
                "args": others,
                "defaults": given.defaults[max(len(given.defaults) - kept, 0) :],
            }
        )
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"({ast.unparse(given)}){result}"


def signature_of_operator(value: Any, node: Any) -> str:
    """The arguments of an operator, by its primitive; types where its declaration has them."""
    inner = [node, *getattr(node, "body", [])] if node is not None else []
    types: dict[str, str] = {}
    for function in inner:
        if isinstance(function, ast.FunctionDef) and function.name in ("apl", "main", value.__name__):
            every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            types |= {
                argument.arg: ast.unparse(argument.annotation)
                for argument in every
                if argument.annotation is not None and not isinstance(argument.annotation, ast.Constant)
            }
    defaults = {**value.apl.defaults, **(getattr(value, "_defaults", None) or {})}
    texts = []
    for name in value.apl.argnames:
        kind = f": {types[name]}" if types.get(name) not in (None, "Symbol", "Value", "Any") else ""
        equals = " = " if kind else "="
        texts.append(f"{name}{kind}" + (f"{equals}{defaults[name]!r}" if name in defaults else ""))
    return without_addresses(f"({', '.join(texts)})")


def without_addresses(text: str) -> str:
    return re.sub(r"<([^<>]*?) at 0x[0-9a-f]+>", r"\1", text)


def facts(member: Member) -> str:
    """What an operator is differentiable in, what it gives, and which derivatives it has."""
    value = member.value
    ain, aout = (
        ", ".join(
            f"`{name}`" + ("" if pattern == "*" else f" (`{name_of(pattern)}`)")
            for name, pattern in names.items()
        )
        for names in (value.ain, value.aout)
    )
    parts = [
        f"differentiable in {ain}" if value.ain else "not differentiable",
        f"gives {aout}" if aout else "gives nothing",
    ]
    if value.ain and hasattr(value, "prototype"):
        if value.vjp is None:
            parts.append("no reverse derivative")
        hvp = getattr(value, "hvp", None)
        if hvp is not None:
            parts.append(
                "exact second derivatives" if isinstance(getattr(hvp, "argnames", None), tuple) else "linear"
            )
    return f"*Operator*: {'; '.join([*parts, *slopes(definition(member.module, member.name))])}."


#: How element-wise operators declare their derivatives, and in words.
SLOPES = {
    "fprime": "derivative",
    "fsecond": "second derivative",
    "fprime1": "derivative by `x1`",
    "fprime2": "derivative by `x2`",
}


def slopes(node: Any) -> Iterator[str]:
    """The derivatives of an element-wise operator, as the source declares them, if NumPy and the arguments are all that
    they speak of."""
    known = {"x", "x1", "x2", "numpy", "math"}
    for statement in getattr(node, "body", []):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[formula])) if name in SLOPES:
                match formula:
                    case ast.Lambda():
                        words = ast.unparse(formula.body)
                    case ast.Attribute():
                        words = f"{ast.unparse(formula)}(x)"
                    case _:
                        continue
                if {part.id for part in ast.walk(formula) if isinstance(part, ast.Name)} <= known:
                    yield f"{SLOPES[name]} `{re.sub(r'(numpy|math)[.]', '', words)}`"


def name_of(pattern: Any) -> str:
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", str(pattern))


@dataclass(frozen=True)
class Method:
    """A public method, property or field of a class."""

    name: str
    kind: str  # "method", "property", "staticmethod" or "classmethod"
    signature: str
    doc: str


def methods(member: Member) -> Iterator[Method]:
    """What a class defines itself; of overloads the one with the docstring."""
    body = getattr(definition(member.module, member.name), "body", [])
    found: dict[str, Method] = {}
    for node in body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        marks = {getattr(mark, "id", getattr(mark, "attr", "")) for mark in node.decorator_list}
        if "setter" in marks or "deleter" in marks:
            continue
        kind = next((kind for kind in ("staticmethod", "classmethod") if kind in marks), "method")
        if marks & {"property", "cached_property"}:
            kind = "property"
        doc = ast.get_docstring(node) or ""
        found[node.name] = Method(node.name, kind, arguments(node, kind != "staticmethod"), doc)
    return iter(found.values())


def bases(member: Member) -> list[Member]:
    """The public classes of its own package that a class inherits from, the nearest first."""
    found = []
    for base in getattr(member.value, "__mro__", ())[1:]:
        if base.__module__.split(".")[0] == member.module.split(".")[0]:
            found += [other for other in members(base.__module__) if other.name == base.__qualname__]
    return found


@cache
def exported(module: str) -> tuple[str, ...]:
    """The names that a module hands on from others of its package: those of ``__all__``, or all that a package imports."""
    chosen = getattr(importlib.import_module(module), "__all__", None)
    if chosen is None:
        chosen = source(module).imports if source(module).file.endswith("__init__.py") else ()
    own = {member.name for member in members(module)}
    return tuple(
        name for name in chosen if name not in own and not name.startswith("_") and home(module, name)
    )
