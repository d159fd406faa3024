"""The processes that accelerate launched: connect them, divide work among them, decide together, end together.

Only this module uses accelerate's processes. A rank is the number of a process.
"""

import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce, str_to_bool
from torch import Tensor

from logra.runtime.memory import available_memory

P = ParamSpec("P")
T = TypeVar("T")
# The longest wait of a rank for another one: rank 0 tokenises alone, and a faster rank waits for the slowest.
TIMEOUT = timedelta(hours=24)
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 8}  # seconds, seconds, attempts: five minutes
CONNECT_SECONDS = 60
NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}  # fmt: skip
GOODBYE = b"."  # what a rank sends before it ends without an error
_connections: list[socket.socket] = []  # rank 0: to all others; the others: to rank 0
_deciding = ContextVar("_deciding", default=False)  # rank 0 runs a function of on_rank_0


def start() -> None:
    """Connect the processes that accelerate launched. Without a GPU they run on the CPU and use gloo.

    Raises:
        ValueError: There are more processes than GPUs, or the processes do not find each other.
    """
    local, gpus = processes_here(), torch.cuda.device_count()
    if 0 < gpus < local:
        raise ValueError(
            f"expected at most {gpus} processes on this machine, one a GPU, got {local}; lower --num_processes"
        )
    timeout = InitProcessGroupKwargs(timeout=TIMEOUT)
    if "RANK" in os.environ:
        end_with_parent()
        name_network_interface()
    options = {"mixed_precision": "no", "kwargs_handlers": [timeout]}
    connected = Accelerator(cpu=not torch.cuda.is_available(), **options).num_processes
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != connected:
        raise ValueError(f"expected {world} processes (WORLD_SIZE), got {connected}; use accelerate launch")
    if world > 1:
        end_with_others()


def check_launch() -> str | None:
    """Return the mixed precision that accelerate's configuration asks for, bf16 or fp16, which is not used; or None.

    Raises:
        ValueError: The configuration asks for something else than processes.
    """
    asked = [name for variable, name in NOT_SUPPORTED.items() if str_to_bool(os.environ.get(variable) or "0")]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    asked += ["fp8"] * (precision == "fp8") + ["TPU"] * (os.environ.get("PJRT_DEVICE") == "TPU")
    if asked:
        raise ValueError(
            f"expected accelerate to start processes on GPUs or CPUs only, got {', '.join(asked)} in its "
            "configuration; give accelerate launch --config_file scripts/accelerate.yaml (to shard a model, give the "
            "script --fsdp)"
        )
    return precision if precision in ("bf16", "fp16") else None


def state() -> PartialState:
    """Return this process's rank and device, and the number of processes. A single process need not call `start`."""
    return PartialState(cpu=not torch.cuda.is_available())


def processes_here() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_memory(
    bytes_per_process: int,
    what: str,
    remedy: str = "use --hessian ekfac, --lora random, a lower --rank or fewer --layers",
) -> None:
    """Raise a ValueError if this machine lacks the memory for `what` in each of its processes."""
    needed, available = bytes_per_process * processes_here(), available_memory()
    if needed > available:
        raise ValueError(f"expected {needed / 1e9:.3g} GB of memory for {what}, got {available / 1e9:.3g}; {remedy}")


def share(count: int, rank: int | None = None) -> range:
    """Return the indices of a rank's share of `count` items, such as shards; by default this rank's."""
    return range(state().process_index if rank is None else rank, count, state().num_processes)


def gather_list(mine: list) -> list:
    """Return the items of all ranks, in order of rank, on every rank."""
    return gather_object(mine) if state().num_processes > 1 else mine


def on_rank_0(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that decides something from the disk: rank 0 runs it, and every rank returns its result.

    Over a network file system, machines may see different files for a while. Ranks that decided each for itself could
    then wait for each other without end. A ValueError or OSError of rank 0 is raised on every rank. Inside another
    decorated function, which the other ranks do not run, a function just runs.
    """

    @wraps(function)
    def decided(*values: P.args, **options: P.kwargs) -> T:
        if _deciding.get():
            return function(*values, **options)
        outcome: list = [None, None]
        if state().is_main_process:
            token = _deciding.set(True)
            try:
                outcome[0] = function(*values, **options)
            except (ValueError, OSError) as error:
                outcome[1] = error
            finally:
                _deciding.reset(token)
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    return decided


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder that all ranks know, below `parent` or where temporary files go; delete it at the end."""
    made = on_rank_0(lambda: Path(tempfile.mkdtemp(".tmp", prefix, parent)))()
    try:
        yield made
    finally:
        if state().is_main_process:
            shutil.rmtree(made, ignore_errors=True)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of every rank's tensor, on the CPU of every rank."""
    if state().num_processes == 1:
        return tensor.cpu()
    return reduce(tensor.to(state().device), "sum").cpu()


def from_owner(item: int, tensor: Tensor) -> Tensor:
    """Return the tensor of the rank whose share has this item, on the CPU of every rank.

    The other ranks give a tensor of the same shape and type, which may be on the meta device.
    """
    if state().num_processes == 1:
        return tensor.cpu()
    here = torch.empty_like(tensor, device=state().device) if tensor.is_meta else tensor.to(state().device)
    return broadcast(here, item % state().num_processes).cpu()


def end_with_parent() -> None:
    """Start a thread that ends this process as soon as the launcher that started it is gone.

    Raises:
        ValueError: The launcher is gone already: nothing answers at its port.
    """
    parent = os.getppid()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            raise ValueError(f"expected the launcher at {address[0]}:{address[1]}, got {error}; start again") from error

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_others() -> None:
    """Start threads that end this process as soon as another rank has died, on whatever machine.

    Each rank keeps a connection to rank 0. The system closes a process's connections when it ends, in whatever way.
    """
    _connect_to_rank_0()

    def watch(connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # also notices a machine without power
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        try:
            message = connection.recv(1)
        except OSError:
            message = b""
        if message != GOODBYE:
            os._exit(1)

    for connection in _connections:
        threading.Thread(target=watch, args=(connection,), daemon=True).start()


def _connect_to_rank_0() -> None:
    """Connect rank 0 to all other ranks, which show that they are ranks by a token that rank 0 sends them.

    Raises:
        ValueError: Rank 0 can't be reached.
    """
    if state().is_main_process:
        token = secrets.token_bytes(16)
        with socket.create_server(("", 0), backlog=state().num_processes) as server:
            server.settimeout(CONNECT_SECONDS)
            broadcast_object_list([(server.getsockname()[1], token)])
            while len(_connections) < state().num_processes - 1:
                connection = server.accept()[0]
                connection.settimeout(CONNECT_SECONDS)
                if connection.recv(len(token)) == token:
                    _connections.append(connection)
        return
    received: list = [None]
    broadcast_object_list(received)
    port, token = received[0]
    host = os.environ["MASTER_ADDR"]
    try:
        _connections.append(socket.create_connection((host, port), timeout=CONNECT_SECONDS))
    except OSError as error:
        raise ValueError(f"expected rank 0 at {host}:{port}, got {error}; open this network to the machines") from error
    _connections[0].sendall(token)


def finish() -> None:
    """Tell the other ranks that this one ends without an error, and end the connection.

    gloo's threads must end before Python does: one that frees a tensor later aborts the process.
    """
    for connection in _connections:
        with suppress(OSError):  # the other rank has ended already
            connection.sendall(GOODBYE)
    if _connections:
        state().destroy_process_group()


def name_network_interface() -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the network interface that reaches the first machine.

    By default gloo uses the address of this machine's host name. That is often the loopback address, and then the
    machines wait for each other without end.
    """
    family, _, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own_address = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own_address in [entry.address for entry in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
