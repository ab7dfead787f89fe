"""Where ranks meet: on the address that MASTER_ADDR names, and on no other.

torch's store listens on all addresses of rank 0's machine, and gloo on the one of the host's name: any process that
reaches them could take part in a run. Here a run on one machine uses the loopback address.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from datetime import timedelta

import psutil
import torch

from megadistill.errors import TopologyError


def meeting_store(timeout: timedelta) -> torch.distributed.Store | None:
    """Waits for all ranks at MASTER_ADDR and MASTER_PORT.

    Returns:
        The store; None under torchrun, whose agent has one already.

    Raises:
        TopologyError: Rank 0 cannot listen there.
    """
    return None if _has_agent() else open_store(timeout)


def open_store(timeout: timedelta, *, waits: bool = True) -> torch.distributed.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT, which rank 0 (under torchrun its agent) keeps.

    Args:
        timeout: For the connection, and for what waits for a key.
        waits: Rank 0 waits for all ranks.

    Raises:
        TopologyError: Rank 0 cannot listen there.
    """
    host, port, world_size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    if os.environ["RANK"] != "0" or _has_agent():
        return torch.distributed.TCPStore(host, port, world_size, False, timeout)
    # The store closes what it listens on.
    listener = listen(host, port).detach()
    return torch.distributed.TCPStore(
        host, port, world_size, True, timeout, wait_for_workers=waits, master_listen_fd=listener
    )


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address of ``host``.

    It listens on all addresses where that one does not belong to this machine, or is the loopback address only on this
    machine (Debian gives a machine's own name 127.0.1.1).

    Raises:
        TopologyError: The name or the port cannot be used.
    """
    try:
        addresses = [
            (family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ]
        for family, address in addresses:
            if is_loopback(str(address[0])) and not is_loopback(host):
                continue
            try:
                return socket.create_server(address[:2], family=family)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        has_ipv4 = any(family == socket.AF_INET for family, _ in addresses)
        return socket.create_server(("", port), family=socket.AF_INET if has_ipv4 else socket.AF_INET6)
    except OSError as error:
        raise TopologyError(
            f"rank 0 cannot listen on {host} port {port}: {error.strerror}; another port: "
            "deepspeed --master_port N, torchrun --master-port N, MASTER_PORT=N for other launchers"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether a name or address is the loopback address on every machine: "localhost", 127.0.0.1, ::1."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def name_interfaces(host: str) -> dict[str, str]:
    """Variables that keep gloo's and NCCL's sockets on the interface towards ``host``; those that are set are left out.

    NCCL chooses better by itself, except that on one machine it should stay on the loopback interface.
    """
    interface = interface_towards("127.0.0.1" if is_loopback(host) else host)
    if interface is None:
        return {}
    names = ["GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if is_loopback(host) else [])]
    return {name: interface for name in names if name not in os.environ}


def interface_towards(host: str) -> str | None:
    """The network interface whose address this machine uses towards ``host``; None where there is none.

    Nothing is sent: connecting a datagram socket only looks up the route.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    return None
