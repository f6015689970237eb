"""Compile by LLVM, where need be without the pass of TVM whose code LLVM refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from targets import engine

tvm = engine.compiler()

T = TypeVar("T")
# TVM's search for common subexpressions gives vectors of indices a name, and its code generator describes each name to
# a debugger as a variable. LLVM's verifier refuses that of a vector. It depends on the sizes of a network which vectors
# occur twice, mostly in layout changes that are fused with reshapes, slices and concatenations.
_REFUSAL = "#dbg_declare must be a pointer or int"


def accepted(build: Callable[[Mapping[str, Any]], T]) -> T:
    """``build({})``; where LLVM refuses its code, ``build`` with the options that leave the search out.

    LLVM searches for common subexpressions too. Other networks keep the search, and with it the bytes that they had.

    Args:
        build: compiles with these options of a PassContext in addition to its own.
    """
    try:
        return build({})
    except tvm.TVMError as error:
        if _REFUSAL not in str(error):
            raise
    return build({"tir.disable_cse_tir": True})
