"""Compile, where need be without the pass of TVM that fails, or whose result TVM itself or LLVM refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from netship.targets import engine

tvm = engine.compiler()

T = TypeVar("T")
# What a refusal says, and the arguments of a PassContext that leave the pass out.
_FALLBACKS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    # TVM's search for common subexpressions gives vectors of indices a name, and its code generator describes each name
    # to a debugger as a variable. LLVM's verifier refuses that of a vector. It depends on the sizes of a network which
    # vectors occur twice, mostly in layout changes that are fused with reshapes, slices and concatenations. LLVM searches
    # for common subexpressions too.
    (
        ("#dbg_declare must be a pointer or int",),
        {"config": {"tir.disable_cse_tir": True}},
    ),
    # TVM's change of a convolution's layout cannot follow some changes of rank behind it.
    (
        ("BijectiveLayout", "GetStoreRule", "Invalid layout", "mapping[c - 'a']"),
        {"disabled_pass": ["AlterOpLayout"]},
    ),
    # TVM rewrites a chain, such as of sums with constants, link by link, and gives up after six rounds of its rules.
    (
        ("Observed 100 rewrite passes",),
        {"disabled_pass": ["SimplifyExpr", "SimplifyExprPostAlterOp"]},
    ),
)


def accepted(build: Callable[[Mapping[str, Any]], T]) -> T:
    """``build({})``; where a pass's result is refused, ``build`` with the arguments that leave the pass out.

    Other networks keep every pass, and with it the bytes that they had.

    Args:
        build: compiles with these arguments of a PassContext, ``config`` and ``disabled_pass``, in addition to its own.
    """
    arguments: dict[str, Any] = {}
    left = list(_FALLBACKS)
    while True:
        try:
            return build(arguments)
        except tvm.TVMError as error:
            said = str(error)
            for fallback in left:
                refusals, more = fallback
                if any(words in said for words in refusals):
                    left.remove(fallback)
                    arguments = _merged(arguments, more)
                    break
            else:
                raise


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a PassContext that are both: configurations as one, lists of passes joined."""
    config = {**one.get("config", {}), **other.get("config", {})}
    passes = [*one.get("disabled_pass", ()), *other.get("disabled_pass", ())]
    return {"config": config, "disabled_pass": passes}
