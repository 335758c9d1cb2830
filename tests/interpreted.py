"""Triton's interpreter, which for each call of a device function would patch Triton's language anew.

A launch patches it, and so does each function that is called within: 5 ms a time in which it looks through all of the
language, to find nothing that is left to patch. It was 28% of the time of linear_matching_loss.
"""

import inspect


def patch_once():
    """Has a function that is called within a launch patch what is not patched yet, and nothing again."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a release that does it in another way, in its own time
    patch = interpreter._patch_lang

    def patched(fn):
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        left = [part for part in (language, language.core) if part in seen and language.core.is_builtin(part.load)]
        return patch(fn) if left else interpreter._LangPatchScope()

    interpreter._patch_lang = patched
