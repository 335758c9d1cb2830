"""Triton's interpreter, without what it does again and again for nothing: more than half of its time.

A gradient of linear_matching_loss on 20 rows and 500 columns, in 72 programs, was 4.6 seconds of a core and is 2.1.
Each part is left alone where a release does it in another way, in its own time; tests/kernels/test_interpreted.py has
that none changes a result.
"""

import dataclasses
import functools


def hurry():
    """All of it, once a process."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_once(language, interpreter)
    check_nothing(interpreter)
    remember_types(language.core, interpreter)


def patch_once(language, interpreter):
    """Has a function that is called within a launch patch what is not patched yet, and nothing again.

    A launch patches all of the language, and so would each function that is called within: 5 ms, to find nothing.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch = interpreter._patch_lang

    @functools.cache
    def seen_by(fn):
        values = fn.__globals__.values()
        return [part for part in (language, language.core) if any(value is part for value in values)]

    def patched(fn):
        left = any(language.core.is_builtin(part.load) for part in seen_by(fn))
        return patch(fn) if left else interpreter._LangPatchScope()

    interpreter._patch_lang = patched


def check_nothing(interpreter):
    """Sums and products of integers are made once, not in int64 too, for an assertion that only `debug` asks for."""
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def remember_types(core, interpreter):
    """Makes the type of a block, the shape of a tensor and numpy's name of a dtype once for each shape and dtype."""
    block, tensor = core.block_type.__init__, core.tensor.__init__
    blocks, shapes, names = {}, {}, {}

    def block_of(self, element_ty, shape):
        if type(element_ty) is not core.dtype:
            return block(self, element_ty, shape)
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key in blocks:
            vars(self).update(blocks[key])
        else:
            block(self, element_ty, shape)
            blocks[key] = dict(vars(self))

    def tensor_of(self, handle, type):
        key = type.name if type.is_block() else ""
        if key in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shapes[key]
        else:
            tensor(self, handle, type)
            if vars(self).keys() == {"handle", "type", "dtype", "numel", "shape"}:
                shapes[key] = self.numel, self.shape

    core.block_type.__init__, core.tensor.__init__ = block_of, tensor_of
    if hasattr(interpreter, "_get_np_dtype"):
        named = interpreter._get_np_dtype

        def name_of(tt_dtype):
            name = tt_dtype.scalar.name
            if name not in names:
                names[name] = named(tt_dtype)
            return names[name]

        interpreter._get_np_dtype = name_of
