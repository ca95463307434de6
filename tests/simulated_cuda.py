"""A CUDA device that is not there: tensors say that they lie on it and compute on the CPU.

``install`` makes torch believe in one GPU. Tensors on it are wrappers (PyTorch's Python backend for
PrivateUse1 devices) around tensors on the CPU. Like CUDA it refuses operators on mixed devices, ``numpy()``
and pinning of device tensors and generators of the CPU, and it records where the host waits for the device.

With ``PNEUMO_REAL_CUDA`` nothing is simulated, and a wait for the device within ``count_syncs`` is an error.

It cannot be undone: tests on it run in a process of their own (tests/test_simulated_cuda.py).

Not covered: streams and the hazards of asynchronous copies, limits of memory, the arithmetic of CUDA's
kernels (TF32, cuDNN, the fused optimiser), NCCL, several GPUs, torch.compile, speed.
"""

from __future__ import annotations

import os
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

IS_REAL = bool(os.environ.get("PNEUMO_REAL_CUDA"))
CPP_NAME = "away"  # the device's name inside torch, which would ask for a driver under the name "cuda"
INSIDE, SHOWN = torch.device("cpu"), torch.device("cuda", 0)  # INSIDE is set by install()
PROJECT = "pneumo_experiments/"
SMALL_COPY_BYTES = 2**16  # the host does not wait for a copy of so little from ordinary memory
aten = torch.ops.aten

# Operators after which the host waits for an answer of the device.
# fmt: off
WAITING = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "_unique2",
    "unique_consecutive", "unique_dim", "repeat_interleave", "allclose", "item",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"copy_", "_to_copy", "copy", "_copy_from", "_copy_from_and_resize"}
# Autocast on CUDA: these run in half precision, these in their inputs' widest type, all others in float32.
HALF = {
    "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "prelu", "addmm", "addmv", "addr", "matmul", "linear", "mm", "mv",
    "einsum", "bmm", "baddbmm", "addbmm", "chain_matmul", "linalg_multi_dot", "linalg_vecdot",
    "scaled_dot_product_attention", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell",
}
WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put",
    "tensordot", "scatter_add", "cat", "stack",
}
# fmt: on

waits: Counter[str] = Counter()  # by operator and line of the project
_pinned: set[int] = set()  # addresses of pinned memory
_alive: list[torch.library.Library] = []  # a library's operators go when it does


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; ``_data`` lies on the CPU."""

    _data: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> SimulatedTensor:
        assert type(data) is torch.Tensor, type(data)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=INSIDE,
            requires_grad=requires_grad,
        )
        self._data = data
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return SHOWN

    @property
    def is_cuda(self) -> bool:
        return True

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {SHOWN} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to"
                " host memory first."
            )
        return self.detach().cpu().numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self) -> str:
        return f"{self._data!r} on {SHOWN}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: torch.Tensor = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        arguments = (self._data.clone(), self.dtype, str(SHOWN), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator as CUDA would take it: checked, recorded where the host waits, computed on the CPU."""
    name = func._schema.name.removeprefix("aten::")
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    result_ours = bool(ours) if (to := kwargs.get("device")) is None else _names_us(to)
    if name == "_pin_memory":
        raise RuntimeError(f"cannot pin '{SHOWN.type}' tensor: only dense CPU tensors can be pinned")
    if name in COPYING:
        _check_copy(name, args, kwargs)
    else:
        _check_devices(name, tensors, args)
        for value, argument in zip(args, func._schema.arguments, strict=False):
            on_host = isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor)
            if ours and argument.is_write and on_host:
                raise RuntimeError(
                    f"Expected all tensors on the same device: {name} writes to {value.device}"
                )
        for value in flat:
            _check_generator(value)
    if name in WAITING:
        _record(name)
    if name in INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                _record(f"{name} by bools")
            elif index is not None and not isinstance(index, SimulatedTensor) and not _is_async(index):
                _record(f"{name} by host indices")
    by_data = {id(tensor._data): tensor for tensor in ours}

    def on_cpu(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value._data if isinstance(value, SimulatedTensor) else value

    inner_args, inner_kwargs = pytree.tree_unflatten([on_cpu(value) for value in flat], spec)
    out = _computed(func, name, inner_args, inner_kwargs)
    for tensor in ours:  # as_strided_, squeeze_ and the like change it in place
        data = tensor._data
        layout = (data.shape, data.stride(), data.storage_offset())
        if layout != (tensor.shape, tensor.stride(), tensor.storage_offset()):
            with torch._C._DisableTorchDispatch():
                aten.as_strided_.default(tensor, *layout)
    if not result_ours:
        return out

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, SimulatedTensor):
            return value
        return by_data[id(value)] if id(value) in by_data else SimulatedTensor(value)

    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    with torch.inference_mode(ours[0].is_inference()) if is_view and ours else nullcontext():
        return pytree.tree_map(wrapped, out)


def _computed(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The operator on the CPU; convolutions of fp16, which are slow there, in float32 and then rounded."""
    if name not in ("convolution", "convolution_backward") or args[1].dtype is not torch.float16:
        return func(*args, **kwargs)

    def cast(dtype: torch.dtype) -> Callable[[Any], Any]:
        return lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value

    return pytree.tree_map(cast(torch.float16), func(*map(cast(torch.float32), args), **kwargs))


def _names_us(device: Any) -> bool:
    return torch.device(device).type in (INSIDE.type, SHOWN.type)


def _record(what: str) -> None:
    """Counts a wait of the host, under the line of the project that asked for it."""
    for frame in reversed(traceback.extract_stack()):
        if PROJECT in frame.filename:
            waits[f"{what} {frame.filename.split(PROJECT)[-1]}:{frame.lineno}"] += 1
            return
    waits[f"{what} elsewhere"] += 1


def _is_async(tensor: torch.Tensor) -> bool:
    return tensor.nbytes <= SMALL_COPY_BYTES or tensor.untyped_storage().data_ptr() in _pinned


def _check_copy(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Records a copy between host and device for which the host waits."""
    if name == "copy_":
        source, to_us = args[1], isinstance(args[0], SimulatedTensor)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        source, non_blocking = args[0], kwargs.get("non_blocking", False)
        to = kwargs.get("device")
        to_us = isinstance(source, SimulatedTensor) if to is None else _names_us(to)
    from_us = isinstance(source, SimulatedTensor)
    if from_us and not to_us:
        _record("device to host")  # also without blocking: nobody may read such a copy at once
    if to_us and not from_us and not (non_blocking and _is_async(source)):
        _record("host to device")


def _check_devices(name: str, tensors: list[torch.Tensor], args: Any) -> None:
    if not any(isinstance(tensor, SimulatedTensor) for tensor in tensors):
        return
    for tensor in tensors:
        if isinstance(tensor, SimulatedTensor) or tensor.dim() == 0:
            continue
        is_index = name in INDEXING and any(tensor is index for index in args[1])
        if is_index and isinstance(args[0], SimulatedTensor):
            continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices,"
            f" {SHOWN} and {tensor.device}! (aten::{name})"
        )


def _check_generator(value: Any) -> None:
    if isinstance(value, torch.Generator) and value.device.type != SHOWN.type:
        raise RuntimeError(f"Expected a '{SHOWN.type}' generator but found '{value.device.type}'")


def install() -> None:
    """From now on torch finds one CUDA device."""
    global INSIDE
    if IS_REAL:
        assert torch.cuda.is_available(), "PNEUMO_REAL_CUDA is set, and torch finds no CUDA device"
        return
    module: Any = types.ModuleType(f"torch.{CPP_NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._lazy_init = lambda: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    _setup_privateuseone_for_python_backend(CPP_NAME, backend_module=module)
    INSIDE = torch.device(CPP_NAME, 0)
    _autocast_as_cuda()
    _believe_in_cuda()
    _make_factories()


def _make_factories() -> None:
    """torch.zeros(…, device="cuda") and all other operators that make a tensor from nothing."""
    library = torch.library.Library("aten", "IMPL")
    _alive.append(library)

    def factory(func: Any) -> Callable[..., SimulatedTensor]:
        def make(*args: Any, **kwargs: Any) -> SimulatedTensor:
            _check_generator(kwargs.get("generator"))
            kwargs.pop("pin_memory", None)
            return SimulatedTensor(func(*args, **kwargs | {"device": torch.device("cpu")}))

        return make

    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        arguments = {argument.name for argument in schema.arguments}
        takes_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
        if takes_tensor or "::" in name or not {"device", "dtype", "layout"} <= arguments:
            continue
        overload = getattr(getattr(aten, name, None), schema.overload_name or "default", None)
        if overload is None:
            continue
        full_name = f"{name}.{schema.overload_name}" if schema.overload_name else name
        for key in ("PrivateUse1", "CUDA"):
            library.impl(full_name, factory(overload), key, allow_override=True)

    def pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        pinned = tensor.clone()
        _pinned.add(pinned.untyped_storage().data_ptr())
        return pinned

    def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
        return tensor.untyped_storage().data_ptr() in _pinned

    def copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        return _run(aten.copy_.default, (into, source, non_blocking), {})

    # Where torch itself goes past __torch_dispatch__, as torch.tensor(…, device=…) does.
    library.impl("copy_", copy, "PrivateUse1", allow_override=True)
    library.impl("_pin_memory", pin, "CPU", allow_override=True)
    library.impl("is_pinned", is_pinned, "CPU", allow_override=True)


def _autocast_as_cuda() -> None:
    """The same operators in the same formats as on CUDA; torch leaves that to each backend."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    rest, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _alive.extend([rest, library])

    def cast(func: Any, name: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            flat, spec = pytree.tree_flatten((args, kwargs))
            is_ours = [
                isinstance(x, SimulatedTensor) and x.is_floating_point() and x.dtype != torch.float64
                for x in flat
            ]
            ours = [value for value, found in zip(flat, is_ours, strict=True) if found]
            half = torch.get_autocast_dtype(CPP_NAME)
            narrow = name in HALF or (name in WIDEST and all(x.dtype != torch.float32 for x in ours))
            with torch._C._ExcludeDispatchKeyGuard(key):
                to = half if narrow else torch.float32
                flat = [x.to(to) if found else x for x, found in zip(flat, is_ours, strict=True)]
                args, kwargs = pytree.tree_unflatten(flat, spec)
                return func(*args, **kwargs)

        return kernel

    for full_name in torch._C._dispatch_get_all_op_names():
        if not full_name.startswith("aten::"):
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "AutocastCUDA"):
            name, _, overload = full_name.removeprefix("aten::").partition(".")
            kernel = cast(getattr(getattr(aten, name), overload or "default"), name)
            library.impl(full_name.removeprefix("aten::"), kernel, "AutocastPrivateUse1")


def _believe_in_cuda() -> None:
    """torch.cuda's questions answered, and "cuda" taken for the name of our device."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_initialized": True,
        "get_device_capability": (8, 0),
        "mem_get_info": (2**33, 2**34),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "max_memory_allocated": 3 * 10**9,
    }
    answers |= dict.fromkeys(
        ("_lazy_init", "empty_cache", "synchronize", "manual_seed_all", "manual_seed", "set_device")
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    start = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, INSIDE.type if device_type == SHOWN.type else device_type, *args, **kwargs)

    torch.autocast.__init__ = autocast

    def inside(value: Any) -> Any:
        is_shown = isinstance(value, str | torch.device) and str(value).partition(":")[0] == SHOWN.type
        return INSIDE if is_shown else value

    def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(inside, args), **{name: inside(value) for name, value in kwargs.items()})

        return call

    torch.Tensor.to = renamed(torch.Tensor.to)
    torch.tensor, torch.as_tensor = renamed(torch.tensor), renamed(torch.as_tensor)
    torch.Tensor.cuda = lambda self, device=None, **kwargs: self.to(INSIDE, **kwargs)


@contextmanager
def count_syncs() -> Iterator[Counter[str]]:
    """Counts where the host waits for the device within the block."""
    waits.clear()
    if not IS_REAL:
        yield waits
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
