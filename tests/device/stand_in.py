"""A stand-in for a GPU: it computes on the CPU, and refuses what a GPU would refuse or do wrong.

    with GpuStandIn() as gpu:  # GpuStandIn(2): two of them
        x = torch.ones(3, device="cuda")

A tensor on it is a wrapper (`OnGpu`) around a CPU tensor, and says that its device is cuda:0. Inside the block an
operation that mixes it with host memory, or with another device, raises a RuntimeError. So does a stream that reads
what another stream wrote without waiting for it, memory that is freed while another stream uses it (record_stream is
missing), and a pinned buffer that changes while it is copied. A copy into a pinned buffer without waiting arrives when
its stream is synchronised; until then the buffer holds garbage. `waits` counts the operations in which the host waits
for the device, and `bytes` what is copied to the host and to the device.
"""

import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

MEMORY = 8 * 2**30  # bytes that the device says it has free
COPIES = ("aten::copy_", "aten::_to_copy")
TAKES_HOST_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
WAITS = {  # operations whose results decide about shapes or errors on the host
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount", "aten::_linalg_eigh",
    "aten::is_nonzero", "aten::_linalg_svd",
}  # fmt: skip
REPLACED = {
    # a wrapper can't carry the mark of these views
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
    # a CPU lacks these: products of 16-bit numbers, summed in float32
    torch.ops.aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    torch.ops.aten.bmm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
}


class _Backend(_DummyBackendModule):
    """What torch asks the module of a device. Outside of a stand-in's block the device does not exist."""

    active = 0  # stand-ins

    def is_available(self) -> bool:
        return self.active > 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hooks(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return BACKEND.is_available()


BACKEND = _Backend()
# gives autograd a device, with a thread of its own
_setup_privateuseone_for_python_backend("standin", backend_module=BACKEND, hook=_Hooks())
OWN_NAME = torch.device("standin", 0)


class Stream:
    """A queue of the device. A time is the number of operations that were put into it before."""

    def __init__(self, gpu: "GpuStandIn", index: int = 0):
        self.gpu, self.device, self.time, self.finished = gpu, torch.device("cuda", index), 0, 0
        self.seen: dict[Stream, int] = {}  # how far this stream has waited for others
        self.copies: list[tuple[int, Tensor, Tensor, bool]] = []  # time, pinned buffer, content, whether into it
        gpu.streams.append(self)

    def knows(self, other: "Stream", time: int) -> bool:
        """Return whether what comes next in this stream comes after an operation of another one."""
        return other is self or time <= max(other.finished, self.seen.get(other, 0))

    def wait_stream(self, other: "Stream") -> None:
        self.seen |= {known: max(time, self.seen.get(known, 0)) for known, time in other.seen.items()}
        self.seen[other] = other.time

    def synchronize(self) -> None:
        self.gpu.waits["synchronize"] += 1
        self.finish()

    def record_event(self) -> "Event":
        return Event(self)

    def finish(self, until: int | None = None) -> None:
        """Let the host wait for the stream (until a time), and for what the stream waited for."""
        for stream, time in [*self.seen.items(), (self, self.time if until is None else until)]:
            stream.finished = max(stream.finished, time)
            for copy in [copy for copy in stream.copies if copy[0] <= time]:
                stream.copies.remove(copy)
                _, buffer, content, to_host = copy
                if to_host:
                    buffer.copy_(content)
                elif not torch.equal(buffer, content):
                    raise RuntimeError("a pinned buffer changed while it was copied to the device")


class Event:
    """A mark in a stream, after what was put into it before."""

    def __init__(self, stream: Stream):
        self.stream, self.time = stream, stream.time

    def synchronize(self) -> None:
        self.stream.gpu.waits["synchronize"] += 1
        self.stream.finish(self.time)


class Memory:
    """Who wrote and read a piece of device memory, as (stream, time)."""

    def __init__(self, home: Stream):
        self.home, self.writer = home, (home, 0)
        self.readers: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()

    def touch(self, stream: Stream, writes: bool, name: str) -> None:
        others = {self.writer[0]: self.writer[1]} | (self.readers if writes else {})
        if not all(stream.knows(other, time) for other, time in others.items()):
            raise RuntimeError(f"{name}: a stream uses memory of another one without waiting for it")
        if writes:
            self.writer, self.readers = (stream, stream.time), {}
        else:
            self.readers[stream] = stream.time

    def __del__(self):
        for stream, time in [self.writer, *self.readers.items()]:
            if stream not in self.recorded and not self.home.knows(stream, time):
                self.home.gpu.faults.append("memory was freed while another stream used it: record_stream is missing")


class OnGpu(torch.Tensor):
    """A tensor of the stand-in: `raw` on the CPU, and the memory that it shares with its views."""

    @staticmethod
    def __new__(cls, raw: Tensor, memory: Memory, gpu: "GpuStandIn"):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=OWN_NAME,
        )  # fmt: skip

    def __init__(self, raw: Tensor, memory: Memory, gpu: "GpuStandIn"):
        self.raw, self.memory, self.gpu = raw, memory, gpu

    device = property(lambda self: self.memory.home.device)
    is_cuda = property(lambda self: True)

    def record_stream(self, stream: Stream) -> None:
        self.memory.recorded.add(stream)

    def to(self, *args, **kwargs):
        """As torch.Tensor.to, which can't tell one device of the stand-in from another."""
        like = [getattr(value, "device", value) for value in (*args, *kwargs.values())]
        asked = [value for value in like if str(value).startswith("cuda")]
        index = (torch.device(asked[0]).index or 0) if asked else self.device.index
        moved = self if index == self.device.index else _Move.apply(self, index)
        return torch.Tensor.to(moved, *args, **kwargs)

    def __repr__(self) -> str:
        return f"OnGpu({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # in a thread without the modes
        tensors, _ = tree_flatten((args, kwargs or {}))
        return next(t for t in tensors if isinstance(t, OnGpu)).gpu.run(function, args, kwargs or {})


class _Move(torch.autograd.Function):
    """A copy to another device; the gradient is copied back."""

    @staticmethod
    def forward(ctx, tensor: OnGpu, index: int) -> OnGpu:
        ctx.index = tensor.device.index
        return tensor.gpu.moved(tensor, index)

    @staticmethod
    def backward(ctx, gradient: OnGpu):
        return gradient.gpu.moved(gradient, ctx.index), None


class _Operations(TorchDispatchMode):
    def __init__(self, gpu: "GpuStandIn"):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.gpu.run(function, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Calls each device by the own name of all in arguments, since torch would ask CUDA for `cuda`."""

    def __init__(self, gpu: "GpuStandIn"):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        asked = None

        def renamed(value):
            nonlocal asked
            if not isinstance(value, str | torch.device) or (name := str(value).split(":"))[0] != "cuda":
                return value
            asked = int(name[1]) if len(name) > 1 else 0
            return OWN_NAME

        if function is torch.device:
            return function(*args, **kwargs or {})
        args, named = tuple(map(renamed, args)), {key: renamed(value) for key, value in (kwargs or {}).items()}
        if asked is None:
            return function(*args, **named)
        with self.gpu.asked_for(asked):
            if function in (torch.tensor, torch.as_tensor):
                return function(*args, **named | {"device": "cpu"}).to(OWN_NAME)
            return function(*args, **named)


class GpuStandIn:
    """The devices; see the module.

    Args:
        devices: How many there are.

    Attributes:
        waits: Operation -> how often the host waited for the device there.
        bytes: "to host" and "to device" -> bytes copied.
    """

    def __init__(self, devices: int = 1):
        self.waits, self.bytes, self.faults = Counter[str](), Counter[str](), list[str]()
        self.streams: list[Stream] = []
        self.defaults = [Stream(self, index) for index in range(devices)]
        self.pinned: list[Tensor] = []  # kept: an address belongs to one buffer
        self.current = threading.local()

    def __enter__(self) -> Self:
        self.exit = ExitStack()
        self.exit.enter_context(mock.patch.object(BACKEND, "active", BACKEND.active + 1))
        self.exit.enter_context(self.modes())
        run, modes = threading.Thread.run, self.modes

        def run_in_modes(thread: threading.Thread) -> None:
            with modes():
                run(thread)

        self.exit.enter_context(mock.patch.object(threading.Thread, "run", run_in_modes))
        functions = {
            "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: len(self.defaults),
            "current_device": lambda: 0, "set_device": lambda device: None,
            "Stream": lambda device=None: Stream(self, torch.device(device or "cuda").index or 0),
            "current_stream": lambda device=None: self.stream(torch.device(device or "cuda").index or 0),
            "stream": self.use, "synchronize": self.synchronize,
            "mem_get_info": lambda device=None: (MEMORY, MEMORY), "max_memory_allocated": lambda device=None: 0,
            "empty_cache": lambda: None, "is_bf16_supported": lambda *_: True,
            "get_device_capability": lambda device=None: (9, 0), "manual_seed_all": lambda seed: None,
        }  # fmt: skip
        self.exit.enter_context(mock.patch.multiple(torch.cuda, **functions))
        return self

    def __exit__(self, kind, *_) -> None:
        self.exit.close()
        if kind is None:
            for stream in self.streams:
                stream.finish()
            if self.faults:
                raise RuntimeError(self.faults[0])

    @contextmanager
    def modes(self):
        with _Names(self), _Operations(self):
            yield

    def stream(self, index: int) -> Stream:
        """Return the stream of a device that is this thread's."""
        return getattr(self.current, f"stream{index}", self.defaults[index])

    @contextmanager
    def use(self, stream: Stream):
        index = stream.device.index
        before = self.stream(index)
        setattr(self.current, f"stream{index}", stream)
        try:
            yield
        finally:
            setattr(self.current, f"stream{index}", before)

    @contextmanager
    def asked_for(self, index: int):
        """Put what this thread makes without a tensor of a device on this device."""
        before, self.current.asked = self.asked, index
        try:
            yield
        finally:
            self.current.asked = before

    @property
    def asked(self) -> int:
        """The device that was asked for; without a name, as torch's own code asks, that of the last operation."""
        return getattr(self.current, "asked", 0)

    def moved(self, tensor: OnGpu, index: int) -> OnGpu:
        """Return a copy on another device, in the current streams of both, which wait for each other."""
        source, target = self.stream(tensor.device.index), self.stream(index)
        source.wait_stream(target)
        source.time += 1
        tensor.memory.touch(source, False, "a copy between devices")
        target.wait_stream(source)
        return self.new(tensor.raw.clone(), index)

    def new(self, raw: Tensor, index: int) -> OnGpu:
        """Return a tensor in new memory of a device."""
        memory = Memory(self.stream(index))
        memory.writer = memory.home, memory.home.time
        return OnGpu(raw, memory, self)

    def synchronize(self, device=None) -> None:
        self.waits["synchronize"] += 1
        for stream in self.streams:
            stream.finish()

    def wait(self, name: str, own: list[OnGpu]) -> None:
        """Let the host wait for the stream of this thread on the tensors' device."""
        self.waits[name] += 1
        self.stream(self.index(own)).finish()

    def index(self, own: list[OnGpu]) -> int:
        """Return the number of the tensors' device; without any, of the one that was asked for."""
        return own[0].device.index if own else self.asked

    def run(self, function, args: tuple, kwargs: dict):
        """Run an operation of torch on the CPU tensors, after the checks."""
        name = function._schema.name
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        own = [t for t in tensors if isinstance(t, OnGpu)]
        asked = kwargs.get("device")
        to_gpu = bool(own) if asked is None else torch.device(asked).type in (OWN_NAME.type, "cuda")
        raw_args, raw_kwargs = tree_map_only(OnGpu, lambda t: t.raw, (args, dict(kwargs)))
        if asked is not None:
            raw_kwargs["device"] = "cpu"
        pin = name == "aten::_pin_memory" or raw_kwargs.pop("pin_memory", None)
        if name == "aten::is_pinned":
            return self.is_pinned(tensors[0])
        if name in COPIES:
            return self.copy(function, args, kwargs, raw_args, raw_kwargs, to_gpu)
        if name == "aten::_pin_memory":
            out = args[0].clone()
        else:
            self.check(function, name, own, [t for t in tensors if not isinstance(t, OnGpu)], args)
            out = REPLACED.get(function, function)(*raw_args, **raw_kwargs)
        if pin:
            self.pinned.append(out)
        if not own and not to_gpu:
            return out
        self.touch(function, own, args, kwargs, name)
        if name in WAITS or (name in TAKES_HOST_INDICES and self.is_mask(args[1])):
            self.wait(name, own)
        return self.wrapped(out, own) if to_gpu else out

    def is_mask(self, indices) -> bool:
        """Return whether indices are a mask, or on the host: the host then waits for the device."""
        return any(isinstance(i, Tensor) and (i.dtype == torch.bool or not isinstance(i, OnGpu)) for i in indices)

    def is_pinned(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr() if not isinstance(tensor, OnGpu) else None
        return any(buffer.untyped_storage().data_ptr() == address for buffer in self.pinned)

    def check(self, function, name: str, own: list[OnGpu], host: list[Tensor], args: tuple) -> None:
        """Raise a RuntimeError if an operation mixes memory of host and device."""
        if len(found := {str(t.device) for t in own}) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, got {' and '.join(sorted(found))}")
        if not own or name in TAKES_HOST_INDICES:
            return
        into_host = function._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], OnGpu)
        if into_host or any(t.dim() for t in host):
            raise RuntimeError(f"{name}: expected all tensors on one device, got cuda:0 and cpu")

    def touch(self, function, own: list[OnGpu], args: tuple, kwargs: dict, name: str) -> None:
        """Note the use of memory by the stream of this thread."""
        self.current.asked = self.index(own)
        stream = self.stream(self.current.asked)
        stream.time += 1
        written = set()
        for argument, value in [*zip(function._schema.arguments, args, strict=False), *(
            (argument, kwargs[argument.name]) for argument in function._schema.arguments if argument.name in kwargs
        )]:  # fmt: skip
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {id(t) for t in tree_flatten(value)[0]}
        for tensor in own:
            tensor.memory.touch(stream, id(tensor) in written, name)

    def wrapped(self, out, own: list[OnGpu]):
        """Return an operation's result on the device; what shares memory with an input keeps its memory."""

        def wrap(raw: Tensor) -> OnGpu:
            for tensor in own:
                if tensor.raw is raw:
                    return tensor
            address = raw.untyped_storage().data_ptr()
            memory = next((t.memory for t in own if address and t.raw.untyped_storage().data_ptr() == address), None)
            return self.new(raw, self.index(own)) if memory is None else OnGpu(raw, memory, self)

        return tree_map_only(Tensor, wrap, out)

    def copy(self, function, args, kwargs, raw_args, raw_kwargs, to_gpu: bool):
        """Run a copy: between host and device, or on the device."""
        in_place = function._schema.name == "aten::copy_"
        source, target = (args[1], args[0]) if in_place else (args[0], None)
        from_gpu, to_gpu = isinstance(source, OnGpu), isinstance(target, OnGpu) if in_place else to_gpu
        raw_source = raw_args[1] if in_place else raw_args[0]
        named = torch.device(kwargs.get("device") or OWN_NAME)
        asked = named.index or 0 if named.type == "cuda" else self.asked  # `cuda` comes from a thread without _Names
        if from_gpu and to_gpu:
            end = target.device.index if in_place else source.device.index if named.type != "cuda" else asked
            if end != source.device.index:
                source = self.moved(source, end)
                raw_args = (raw_args[0], source.raw, *raw_args[2:]) if in_place else (source.raw, *raw_args[1:])
        own = [t for t in (source, target) if isinstance(t, OnGpu)]
        free = kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2])
        if own:
            self.touch(function, own, args, kwargs, function._schema.name)
        if from_gpu == to_gpu:
            out = function(*raw_args, **raw_kwargs)
            return self.wrapped(out, own) if to_gpu else out
        self.bytes["to host" if from_gpu else "to device"] += raw_source.nbytes
        if from_gpu and in_place and free and self.is_pinned(target):
            stream = self.stream(self.index(own))
            stream.copies.append((stream.time, target, raw_source.clone(), True))
            return target.copy_(torch.full_like(target, float("nan") if target.is_floating_point() else 85))
        if not from_gpu and free and self.is_pinned(source):
            stream = self.stream(self.index(own))
            stream.copies.append((stream.time, source, source.clone(), False))
        elif not (free and not from_gpu):
            self.wait(function._schema.name, own)
        out = function(*raw_args, **raw_kwargs)
        if in_place:
            return target
        if from_gpu:
            return out
        self.stream(asked).time += 1
        return self.new(out.clone() if out is raw_source else out, asked)
