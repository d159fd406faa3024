"""One of several processes: it ends with its launcher, and tells gloo the way to the first machine."""

import os
import socket
import threading
import time

import psutil


def end_with_parent() -> None:
    """End this process, from a thread, as soon as the launcher that started it is gone.

    Raises:
        ValueError: It is gone already; another process is the parent then, but nobody serves the launcher's port.
    """
    parent = os.getppid()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(place, timeout=60).close()
        except OSError as error:
            raise ValueError(f"expected the launcher at {place[0]}:{place[1]}, got {error}; start again") from error

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def name_interface() -> None:
    """Tell gloo which network reaches the first machine, unless GLOO_SOCKET_IFNAME does.

    gloo takes the address that this machine's own name has, which is often the loopback's: then machines wait for ever.
    """
    family, _, _, _, place = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if mine in [address.address for address in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
