"""A plugin for the type checker mypy, which does not know that a decorator makes an operator of a class.

Name it in the configuration of mypy: `plugins = ["vmad_lit.core.mypy_plugin"]`.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import ARG_STAR, ARG_STAR2, MDEF, FuncDef, SymbolTableNode, TypeInfo, Var
from mypy.plugin import AttributeContext, ClassDefContext, FunctionContext, FunctionSigContext, Plugin
from mypy.types import AnyType, CallableType, FunctionLike, Type, TypeOfAny

DECORATORS = {
    "vmad_lit.core.operator.operator",
    "vmad_lit.core.autooperator.autooperator",
    "vmad_lit.core.registry.overloaded",
}
MARK = "vmad_lit"
ATTRIBUTES = "apl", "vjp", "jvp", "hvp", "prototype", "register"
ANY = AnyType(TypeOfAny.special_form)


class OperatorPlugin(Plugin):
    """Calls of operators take any arguments and return anything; attributes are those of `Operator`."""

    def get_class_decorator_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        return mark if fullname in DECORATORS else None

    def get_customize_class_mro_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        return free_formulas

    def is_operator(self, fullname: str) -> bool:
        symbol = self.lookup_fully_qualified(fullname)
        return symbol is not None and isinstance(symbol.node, TypeInfo) and MARK in symbol.node.metadata

    def get_function_signature_hook(
        self, fullname: str
    ) -> Callable[[FunctionSigContext], FunctionLike] | None:
        return free_signature if self.is_operator(fullname) else None

    def get_function_hook(self, fullname: str) -> Callable[[FunctionContext], Type] | None:
        return (lambda context: ANY) if self.is_operator(fullname) else None

    def get_class_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return (lambda context: ANY) if self.is_operator(fullname.rpartition(".")[0]) else None


def mark(context: ClassDefContext) -> None:
    """Remember, also in the cache of mypy, that a class is an operator; it has some attributes more."""
    info = context.cls.info
    info.metadata[MARK] = {"operator": True}
    for name in ATTRIBUTES:
        if name not in info.names:
            variable = Var(name, ANY)
            variable.info, variable._fullname = info, f"{info.fullname}.{name}"
            info.names[name] = SymbolTableNode(MDEF, variable)


def free_formulas(context: ClassDefContext) -> None:
    """Take the functions of a node in a declaration, or in a base for declarations, for formulas of anything."""
    for f in context.cls.defs.body:
        if isinstance(f, FuncDef) and f.type is None and f.arg_names[:1] == ["node"]:
            plain = context.api.named_type("builtins.function")
            f.type = CallableType([ANY] * len(f.arguments), f.arg_kinds, f.arg_names, ANY, plain)
            f.is_static = True


def free_signature(context: FunctionSigContext) -> CallableType:
    """A signature that takes everything."""
    return context.default_signature.copy_modified(
        arg_types=[ANY, ANY], arg_kinds=[ARG_STAR, ARG_STAR2], arg_names=[None, None], ret_type=ANY
    )


def plugin(version: str) -> type[Plugin]:
    """The entry point that mypy looks for."""
    return OperatorPlugin
