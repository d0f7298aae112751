"""The few private calls of torch that this package makes, each with its reason.

Public torch has no equivalent. A torch that lacks one raises ImportError or AttributeError and
never changes a result. Tested with torch 2.11 and 2.14.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _TorchDispatchModeKey as ModeKey
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling, is_dynamo_compiling

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
"""Classes that override nothing. Compared by type, because a subclass may override anything."""

# Looked up once: a call asks for all of them, and each look-up takes 13 ns.
_are_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_count_modes = torch._C._len_torch_dispatch_stack
_is_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_TRACING_MODES = (ModeKey.FAKE, ModeKey.PROXY, ModeKey.FUNCTIONAL)


def is_traced() -> bool:
    """Whether a tracer, a transform of torch.func or forward-mode AD sees the calls made here.

    All of them see operators and their registered derivatives. Most do not see an
    `autograd.Function`, or they look inside its forward.
    """
    return (
        is_dynamo_compiling()  # a non-strict export shows in the modes below
        or _are_transforms_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or (_count_modes() > 0 and _is_mode_tracing())
        or _is_key_included(_PRE_DISPATCH)
    )


def is_transform_traced_above_autograd() -> bool:
    """Whether make_fx(..., pre_dispatch=True) records the inside of a transform of torch.func.

    For any function, the graph then holds the numbers of the transform's level as constants.
    """
    return not is_compiling() and _is_key_included(_PRE_DISPATCH) and _are_transforms_active()


def is_jit_traced() -> bool:
    """Whether torch.jit.trace is recording."""
    return _tracing_state() is not None


def _is_mode_tracing() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)


def dispatches_itself(tensor: Tensor) -> bool:
    """Whether its class takes operators itself (`__torch_dispatch__`): FakeTensor, DTensor, ..."""
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


is_batched_upstream = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor holds all upstreams of `torch.autograd.grad(..., is_grads_batched=True)`."""

keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether the running backward keeps the graph for another one (retain_graph)."""


def have_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD differentiates one of them, at the level that is being dispatched."""
    if forward_ad._current_level < 0 and not _are_transforms_active():
        return False
    return any(t is not None and torch._VF._unpack_dual(t, level=0)[1] is not None for t in tensors)


def require_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on one of them."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context that skips operators' kernels for autograd; the one that native.py registers takes 3 us.

The rest of the dispatcher stays: negated views, zero tensors, dispatch modes, the profiler.
"""


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor with its numbers where its pointer says: no negated view, no zero tensor.

    The dispatcher gives operators such tensors; code that takes a pointer itself must call this.
    """
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def call_below_autograd(operator: Any, keyset: Any, *args: Any) -> Any:
    """From within an operator's kernel for autograd, call its kernel below autograd."""
    with below_autograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def function_for_kernels(
    function: type[torch.autograd.Function],
) -> Callable[..., Any]:
    """`function.apply` for use within an operator's kernel for autograd.

    Under a transform of torch.func, `apply` would enter the stack of transforms again at its top,
    but the kernel is called for one level of the stack and must record at that level. `apply` runs
    a forward with recording off, as its own level needs; `forward` turns it on for those below.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return function.forward(ctx, *args)

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    single_level: Any = type(f"{function.__name__}AtOneLevel", (_SingleLevelFunction,), members)

    def apply(*args: Any) -> Any:
        if not _are_transforms_active():
            return function.apply(*args)
        with enable_single_level_autograd_function():
            return single_level.apply(*args)

    return apply


def fake_tensors() -> AbstractContextManager[Any]:
    """While entered, new tensors have shapes, dtypes and devices, but no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # it brings sympy

    return FakeTensorMode()


_LIBRARY = torch.library.Library("bstriplet", "FRAGMENT")


def register_autograd_kernel(operator: Any, kernel: Callable[..., Any]) -> None:
    """Register `kernel(keyset, *args)` as what autograd and forward-mode AD call for `operator`.

    `torch.library.register_autograd` supports neither forward mode nor torch.func's transforms.
    """
    _LIBRARY.impl(operator, kernel, "Autograd", with_keyset=True)


_NO_CONTEXT = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """While entered, products stay in the accumulation dtype, whatever autocast would choose."""
    if not torch._C._is_any_autocast_enabled():
        return _NO_CONTEXT
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NO_CONTEXT


def is_known_true(comparison: bool) -> bool:
    """Whether a comparison of sizes is surely true.

    A tracer may not know; the operator checks again when it runs.
    """
    if is_compiling() or isinstance(comparison, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # it brings sympy

        return guard_or_false(comparison)
    return comparison


@contextlib.contextmanager
def numbers_of_shapes() -> Iterator[None]:
    """While entered, sizes are ints under `torch.jit.trace`, not tensors, which warn if compared.

    Without that tracer it does nothing.
    """
    state = _tracing_state()
    if state is None:
        yield
        return
    set_state = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        yield
    finally:
        set_state(state)
