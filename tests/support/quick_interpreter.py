"""Triton's interpreter without what it does again for each operation; it computes the same."""

import dataclasses
import functools
import math

import triton


def install():
    """Save most of the time of kernels of many programs, where the version has these names."""
    if not triton.__version__.startswith("3.8."):
        return
    _replace_the_language_once()
    _make_each_type_once()
    _leave_equal_types_and_shapes_alone()


def _replace_the_language_once():
    """A launch, and a call of a device function as `tl.sum`, replaced the language's in 3 ms.

    Nor is each sum of integers asked whether it overflows, which is reported under `debug` alone.
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

    def replace_member(owner, name, member, builder, scope):
        """One call in place of three: `member` asks for _semantic, and calls what it wraps."""
        wrapped = getattr(member, "__wrapped__", member)

        def call(*args, **keywords):
            keywords["_semantic"] = interpreter.interpreter_semantic
            return wrapped(*args, **keywords)

        scope.set_attr(owner, name, call)

    def dtype_by_name(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = find_dtype(dtype)
        return dtypes[dtype.name]

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = replace_once
    interpreter._patch_attr = replace_member
    interpreter._get_np_dtype = dtype_by_name


def _make_each_type_once():
    """A block's type and its shape, each number of which is an object, are made once."""
    from triton.language import core

    make_type = core.block_type.__init__
    types = {}  # attributes of a type of block by its elements and shape
    shapes = {}  # by shape: that of a type, and that and the size of a tensor

    def type_of_block(self, element_ty, shape):
        numbers = shape.values if type(shape) is core.tuple else shape
        numbers = tuple(n.value if type(n) is core.constexpr else n for n in numbers)
        known = types.get((element_ty.name, numbers))
        if known is None:
            make_type(self, element_ty, shape)
            of_tensor = core.tuple([core.constexpr(n) for n in numbers])
            size = core.constexpr(math.prod(numbers))
            self.shape, self.of_tensor = shapes.setdefault(numbers, (self.shape, (of_tensor, size)))
            types[element_ty.name, numbers] = known = dict(self.__dict__)
        self.__dict__.update(known)

    of_scalar = core.tuple([]), core.constexpr(1)

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensor if type.is_block() else of_scalar

    core.block_type.__init__ = type_of_block
    core.tensor.__init__ = tensor


def _leave_equal_types_and_shapes_alone():
    """The most frequent cases of a cast, a broadcast, and comparisons of types and shapes."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    cast, broadcast = TritonSemantic.cast, TritonSemantic.broadcast_impl_value
    equal, equal_tuples = core.dtype.__eq__, core.tuple.__eq__

    def cast_to_another(self, input, dst_ty, fp_downcast_rounding=None):
        if input.dtype is dst_ty.scalar:
            return input
        return cast(self, input, dst_ty, fp_downcast_rounding)

    def broadcast_to_another(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def same(self, other):
        return self is other or equal(self, other)

    def same_numbers(self, other):
        if type(other) is list and all(type(n) is int for n in other):
            return self.values == other
        return equal_tuples(self, other)

    TritonSemantic.cast = cast_to_another
    TritonSemantic.broadcast_impl_value = broadcast_to_another
    core.dtype.__eq__ = same
    core.tuple.__eq__ = same_numbers
