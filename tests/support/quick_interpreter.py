"""Triton's interpreter without work whose result is not used. What it computes stays the same.

It replaces private functions of Triton. Where these are not as known here, nothing is replaced, and tests take longer.

More than half of its time goes into two things. Each call of a device function replaces Triton's builtins, although the
launch has replaced them already. And each operation on integers is repeated in 64 bits to find an overflow, and the
answer is used only if Triton debugs.
"""

from dataclasses import fields, replace
from functools import cache
from inspect import getmembers, signature

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def _builtins_of(package) -> list[str]:
    return [name for name, member in getmembers(package) if is_builtin(member)]


def _patch_builtin(package, *rest):
    """As Triton's own, but it looks through a module or class for builtins only once."""
    for name in _builtins_of(package):
        member = getattr(package, name)
        if is_builtin(member):  # a launch may be under way, which has replaced it
            interpreter._patch_attr(package, name, member, *rest)


def _once_for_each_launch():
    """Makes device functions replace the builtins that their module sees once in a launch."""
    patch_lang, launch, seen = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def start(*args, **kwargs):
        seen.clear()
        return launch(*args, **kwargs)

    def patch(function):
        module = id(function.__globals__)
        if module in seen:
            return None
        seen.add(module)
        return patch_lang(function)

    interpreter.GridExecutor.__call__ = start
    interpreter._patch_lang = patch


def fits() -> bool:
    """Whether Triton's interpreter has the private parts that are replaced here, in a form that is known."""
    try:
        replaced = (interpreter._patch_attr, interpreter._patch_builtin, interpreter._patch_lang)
        arguments = [[*signature(function).parameters] for function in replaced]
        options = {field.name for field in fields(interpreter.interpreter_builder.options)}
        has_call = "__call__" in vars(interpreter.GridExecutor)
    except (AttributeError, TypeError, ValueError):
        return False
    known = [
        [["obj", "name", "member", "builder", *scope], ["pkg", "builder", *scope], ["fn"]] for scope in ([], ["scope"])
    ]
    return has_call and arguments in known and {"sanitize_overflow", "debug"} <= options


def install() -> bool:
    """Changes the interpreter of this process. Of a release of Triton that is not known, it changes nothing.

    Returns:
        Whether it is changed.
    """
    if not fits():
        return False
    for package in (interpreter.tl, interpreter.tl.core, interpreter.tl.tensor, interpreter.tl.math):
        _builtins_of(package)  # while all of them are Triton's own
    interpreter._patch_builtin = _patch_builtin
    _once_for_each_launch()
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    return True
