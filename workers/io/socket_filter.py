"""Hands the programs of workers/core/bpf.py to the kernel."""

import ctypes
import socket

from workers.core.bpf_code import INSTRUCTION

SO_ATTACH_FILTER = 26
SO_ATTACH_REUSEPORT_CBPF = 51


class _Program(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def attach_filter(sock: socket.socket, program: bytes) -> None:
    """Filter what the socket receives from now on, instead of by its filter so far.

    Raises OSError; PermissionError on a TCP socket without CAP_NET_ADMIN (AF_PACKET and UDP need no right).
    """
    _set_program(sock, SO_ATTACH_FILTER, program)


def attach_socket_choice(sock: socket.socket, program: bytes) -> None:
    """Let the program choose among the sockets that share the address of `sock` by SO_REUSEPORT. Raises OSError.

    They are numbered in the order in which they were bound (UDP) or began to listen (TCP).
    """
    _set_program(sock, SO_ATTACH_REUSEPORT_CBPF, program)


def has_filter(sock: socket.socket) -> bool:
    """Whether a filter is attached, inherited ones too. Raises OSError."""
    # SO_GET_FILTER counts instructions, not bytes, and with no room given tells how many there are.
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_uint(0)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_ATTACH_FILTER, None, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, "SO_GET_FILTER")
    return length.value > 0


def _set_program(sock: socket.socket, option: int, program: bytes) -> None:
    held = ctypes.create_string_buffer(program, len(program))  # the kernel copies it during the call
    described = _Program(len(program) // INSTRUCTION.size, ctypes.addressof(held))
    sock.setsockopt(socket.SOL_SOCKET, option, bytes(described))
