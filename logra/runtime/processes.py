"""The processes that accelerate launched: connect them, divide work among them, end them with their launcher.

Only this module uses accelerate's processes. A rank is the number of a process.
"""

import os
import socket
import threading
import time
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor


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
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=7))  # the other ranks wait while rank 0 tokenises
    if "RANK" in os.environ:
        end_with_parent()
        name_network_interface()
    connected = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[timeout]).num_processes
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != connected:
        raise ValueError(f"expected {world} processes (WORLD_SIZE), got {connected}; use accelerate launch")


def state() -> PartialState:
    """Return this process's rank and device, and the number of processes. A single process need not call `start`."""
    return PartialState(cpu=not torch.cuda.is_available())


def processes_here() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share(count: int) -> range:
    """Return the indices of this rank's share of `count` items, such as shards."""
    return range(state().process_index, count, state().num_processes)


def gather_list(mine: list) -> list:
    """Return the items of all ranks, in order of rank, on every rank."""
    return gather_object(mine) if state().num_processes > 1 else mine


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of every rank's tensor, on the CPU of every rank."""
    if state().num_processes == 1:
        return tensor.cpu()
    return reduce(tensor.to(state().device), "sum").cpu()


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
