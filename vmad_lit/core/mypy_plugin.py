"""A plugin for the type checker mypy, which does not know that a decorator makes an operator of a class.

Name it in the configuration of mypy: `plugins = ["vmad_lit.core.mypy_plugin"]`.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import ARG_STAR, ARG_STAR2, MemberExpr, NameExpr, TypeInfo
from mypy.plugin import AttributeContext, FunctionContext, FunctionSigContext, Plugin
from mypy.types import AnyType, CallableType, FunctionLike, Type, TypeOfAny

DECORATORS = {
    "vmad_lit.core.operator.operator",
    "vmad_lit.core.autooperator.autooperator",
    "vmad_lit.core.registry.overloaded",
}
ANY = AnyType(TypeOfAny.special_form)


class OperatorPlugin(Plugin):
    """Calls of operators take any arguments and return anything; their attributes are those of `Operator`."""

    def is_operator(self, fullname: str) -> bool:
        symbol = self.lookup_fully_qualified(fullname)
        if symbol is None or not isinstance(symbol.node, TypeInfo):
            return False
        decorators = symbol.node.defn.decorators
        return any(isinstance(d, (NameExpr, MemberExpr)) and d.fullname in DECORATORS for d in decorators)

    def get_function_signature_hook(self, fullname: str) -> Callable[[FunctionSigContext], FunctionLike] | None:
        return free_signature if self.is_operator(fullname) else None

    def get_function_hook(self, fullname: str) -> Callable[[FunctionContext], Type] | None:
        return (lambda context: ANY) if self.is_operator(fullname) else None

    def get_class_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return (lambda context: ANY) if self.is_operator(fullname.rpartition(".")[0]) else None


def free_signature(context: FunctionSigContext) -> CallableType:
    """A signature that takes everything."""
    return context.default_signature.copy_modified(
        arg_types=[ANY, ANY], arg_kinds=[ARG_STAR, ARG_STAR2], arg_names=[None, None], ret_type=ANY
    )


def plugin(version: str) -> type[Plugin]:
    """The entry point that mypy looks for."""
    return OperatorPlugin
