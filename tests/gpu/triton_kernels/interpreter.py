"""What Triton's interpreter lacks as a test bench: bfloat16, tf32, and a memory that objects.

The interpreter keeps bfloat16 as uint16 and computes with the bits as if they were integers. Here conversions round to
nearest even and dots take the values; other arithmetic in bfloat16 is refused, since kernels accumulate in float32.
Operands of a tf32 dot lose the mantissa bits that tensor cores drop, without rounding.

Every load and store is checked. An address must be an element of a tensor that was passed to the launch, or whose
address is among the int64 values passed to it: neither one past its end nor in the gap between two rows. Nothing that
one program stores may be read, by any, or be stored by another, but with the same bits: then the order of programs and
of threads cannot matter. Atomics are refused, as their order does.

To be imported in a process with TRITON_INTERPRET=1; ``install`` changes the interpreter for good.
"""

from __future__ import annotations

import collections
import weakref

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from bench.gpu import interpreting
from bench.gpu.ahead_of_time import launches_kernel, tensor_bytes
from rankkernels._triton import _alignment

NOBODY, MANY = -1, -2

#: The memories of the last launches, in their order.
launched: collections.deque[Memory] = collections.deque(maxlen=32)


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of ``x`` rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """``x`` with 10 of its mantissa bits: a tensor core is given float32 and reads no more of it."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def addresses_of(t: torch.Tensor) -> np.ndarray:
    offsets = np.zeros((), np.int64)
    for size, stride in zip(t.shape, t.stride()):
        offsets = offsets[..., None] + np.arange(size) * stride
    return (t.data_ptr() + offsets.ravel() * t.element_size()).astype(np.uint64)


class Memory:
    """The elements of a launch's tensors, how often each was loaded, and which program has read and stored it."""

    def __init__(self, tensors: list[torch.Tensor]):
        addresses = np.concatenate([np.zeros(0, np.uint64), *map(addresses_of, tensors)])
        itemsizes = [np.full(t.numel(), t.element_size()) for t in tensors]
        self.addresses, first = np.unique(addresses, return_index=True)
        self.itemsize = np.concatenate([np.zeros(0, np.int64), *itemsizes])[first]
        self.loads, self.stores = np.zeros((2, self.addresses.size), np.int64)
        self.reader = np.full(self.addresses.size, NOBODY)
        self.writer = np.full(self.addresses.size, NOBODY)
        self.stored = np.zeros(self.addresses.size, np.uint64)

    def elements(self, pointers: TensorHandle, mask: TensorHandle, access: str) -> np.ndarray:
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        element = np.searchsorted(self.addresses, touched).clip(max=max(self.addresses.size - 1, 0))
        if touched.size and (self.addresses.size == 0 or (self.addresses[element] != touched).any()):
            raise AssertionError(f"a {access} outside the tensors of the launch")
        return element

    def loads_of(self, t: torch.Tensor) -> np.ndarray:
        """How often each element of ``t`` was loaded, be it the launch's or not."""
        addresses = addresses_of(t)
        element = np.searchsorted(self.addresses, addresses).clip(max=max(self.addresses.size - 1, 0))
        return np.where(self.addresses[element] == addresses, self.loads[element], 0)

    def bytes_moved(self, streamed: torch.Tensor) -> int:
        """Loads of ``streamed`` and all stores as often as they happen. What else is loaded counts once: weights, and
        vectors of a sample that a program reads for each block of rows, come from the caches after that."""
        loads = np.minimum(self.loads, 1)
        element = np.searchsorted(self.addresses, addresses_of(streamed)).clip(max=max(self.addresses.size - 1, 0))
        element = element[self.addresses[element] == addresses_of(streamed)]
        loads[element] = self.loads[element]
        return int(((loads + self.stores) * self.itemsize).sum())

    def load(self, pointers: TensorHandle, mask: TensorHandle, program: int) -> None:
        element = self.elements(pointers, mask, "load")
        if (self.writer[element] != NOBODY).any():
            raise AssertionError("a program loads what was stored in the same launch")
        np.add.at(self.loads, element, 1)
        reader = self.reader[element]
        self.reader[element] = np.where((reader == NOBODY) | (reader == program), program, MANY)

    def store(self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, program: int) -> None:
        element, shape = self.elements(pointers, mask, "store"), pointers.data.shape
        bits = np.ascontiguousarray(np.broadcast_to(value.data, shape)[np.broadcast_to(mask.data, shape)])
        bits = bits.view(f"u{bits.itemsize}").astype(np.uint64)
        writer, reader = self.writer[element], self.reader[element]
        if ((writer != NOBODY) & (writer != program) & (self.stored[element] != bits)).any():
            raise AssertionError("a program stores what another one stores")
        if ((reader != NOBODY) & (reader != program)).any():
            raise AssertionError("a program stores what another one loads")
        self.writer[element] = np.where((writer == NOBODY) | (writer == program), program, MANY)
        self.stored[element] = bits
        np.add.at(self.stores, element, 1)


class BytesAround(TorchDispatchMode):
    """``bytes`` of the tensors that PyTorch's own kernels take and return, those of launches left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if launches_kernel(func):
            self.bytes += tensor_bytes((args, kwargs, result))
        return result


#: Whatever the kernels were given the address of, by address and form.
_addressed: weakref.WeakValueDictionary[tuple, torch.Tensor] = weakref.WeakValueDictionary()


def address(t: torch.Tensor | None) -> int:
    """``_alignment.address``, remembered."""
    if t is None:
        return 0
    _addressed[t.data_ptr(), t.shape, t.stride(), t.dtype] = t
    return t.data_ptr()


def behind_addresses(tensors: list[torch.Tensor], numbers: list[int]) -> list[torch.Tensor]:
    """The tensors whose addresses, of any element, are among the numbers and the int64 values of these."""
    pointed = [t.detach().flatten().numpy() for t in tensors if t.dtype == torch.int64 and t.numel()]
    pointed = np.sort(np.concatenate([np.array(numbers, np.int64), *pointed]))
    found = []
    for t in list(_addressed.values()):
        end = t.data_ptr() + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) * t.element_size()
        if t.numel() and np.searchsorted(pointed, t.data_ptr()) < np.searchsorted(pointed, end, "right"):
            found.append(t)
    return found


def install() -> None:
    interpreting.install()
    builder, executor = InterpreterBuilder, GridExecutor
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    load, store = builder.create_masked_load, builder.create_masked_store
    to_host, run = executor._init_args_hst, executor.__call__
    _alignment.address = address
    patch_tensor = interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        if _is_bf16(src) and dst_type.scalar != tl.bfloat16:
            return cast(self, _widened(src), dst_type) if dst_type.scalar != tl.float32 else _widened(src)
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(float32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, acc, precision, max_num_imprecise_acc):
        if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
            a, b = (TensorHandle(cut_to_tf32(h.data), tl.float32) for h in (a, b))
        return dot(self, _widened(a), _widened(b), acc, precision, max_num_imprecise_acc)

    def program(self):
        x, y, z = self.grid_idx
        return (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def create_masked_load(self, pointers, mask, other, *options):
        self.memory.load(pointers, mask, program(self))
        return load(self, pointers, mask, other, *options)

    def create_masked_store(self, pointers, value, mask, *options):
        self.memory.store(pointers, value, mask, program(self))
        return store(self, pointers, value, mask, *options)

    def init_args(self, args, kwargs):
        host_args, host_kwargs = to_host(self, args, kwargs)
        flat = [t for a in (*host_args, *host_kwargs.values()) for t in (a if isinstance(a, tuple) else (a,))]
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        numbers = [v for v in flat if type(v) is int]
        memory = Memory([*tensors, *behind_addresses(tensors, numbers)])
        launched.append(memory)
        interpreter.interpreter_builder.memory = memory
        return host_args, host_kwargs

    def call(self, *args, **kwargs):
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    def patch_lang_tensor(tensor, scope):  # of Triton 3.6, which takes int() of arrays that NumPy 2.4 refuses
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def refuse_bf16(operation):
        def checked(self, *handles_and_op):
            if any(_is_bf16(h) for h in handles_and_op[:-1]):
                raise AssertionError("arithmetic in bfloat16: convert to float32 first")
            return operation(self, *handles_and_op)

        return checked

    def refuse(self, *_, **__):
        raise AssertionError("an atomic operation: its result depends on the order of programs")

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.binary_op, builder.unary_op = refuse_bf16(builder.binary_op), refuse_bf16(builder.unary_op)
    builder.create_atomic_rmw = builder.create_atomic_cas = refuse
    executor._init_args_hst, executor.__call__ = init_args, call
    interpreter._patch_lang_tensor = patch_lang_tensor
