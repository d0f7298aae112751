"""Triton's interpreter without what it does again for each call of a function."""

import dataclasses
import functools


def install():
    """Save half of the time of kernels of many programs; they compute the same.

    At each launch, and at each call of a device function as `tl.sum`, the interpreter replaces the
    functions of the language by its own, in 3 ms. Here it does so once, and keeps them. It computes
    for each sum of integers whether it overflows, which it then reports under its option `debug`
    alone. Here it does not.
    """
    from triton.runtime import interpreter

    replace, find_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    replaced, dtypes = set(), {}

    @functools.cache
    def languages(fn):
        """Which modules of the language are replaced for this function: those that it names."""
        return tuple(
            any(value is module for value in fn.__globals__.values())
            for module in (interpreter.tl, interpreter.tl.core)
        )

    def replace_once(fn):
        if languages(fn) not in replaced:
            replaced.add(languages(fn))
            replace(fn)
        return interpreter._LangPatchScope()  # of nothing to restore

    def dtype_by_name(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = find_dtype(dtype)
        return dtypes[dtype.name]

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = dtype_by_name
