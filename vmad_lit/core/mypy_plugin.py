"""A plugin for the type checker mypy, which does not know that a decorator makes an operator of a class.

Name it in the configuration of mypy: `plugins = ["vmad_lit.core.mypy_plugin"]`.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import ARG_STAR, ARG_STAR2, TypeInfo
from mypy.plugin import AttributeContext, ClassDefContext, FunctionContext, FunctionSigContext, Plugin
from mypy.types import AnyType, CallableType, FunctionLike, Type, TypeOfAny

DECORATORS = {
    "vmad_lit.core.operator.operator",
    "vmad_lit.core.autooperator.autooperator",
    "vmad_lit.core.registry.overloaded",
}
MARK = "vmad_lit"
ANY = AnyType(TypeOfAny.special_form)


class OperatorPlugin(Plugin):
    """Calls of operators take any arguments and return anything; attributes are those of `Operator`."""

    def get_class_decorator_hook_2(self, fullname: str) -> Callable[[ClassDefContext], bool] | None:
        return mark if fullname in DECORATORS else None

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


def mark(context: ClassDefContext) -> bool:
    """Remember, also in the cache of mypy, that a class is an operator."""
    context.cls.info.metadata[MARK] = {"operator": True}
    return True


def free_signature(context: FunctionSigContext) -> CallableType:
    """A signature that takes everything."""
    return context.default_signature.copy_modified(
        arg_types=[ANY, ANY], arg_kinds=[ARG_STAR, ARG_STAR2], arg_names=[None, None], ret_type=ANY
    )


def plugin(version: str) -> type[Plugin]:
    """The entry point that mypy looks for."""
    return OperatorPlugin
