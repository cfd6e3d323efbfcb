"""Ports of the loopback interface for programs that bind them themselves."""

import atexit
from collections import deque
import socket
import sys

#: Sockets that hold the ports of late; a test needs a handful.
_held = deque(maxlen=200)


@atexit.register
def _let_go():
    while _held:
        _held.pop().close()


def free_port():
    """A port of 127.0.0.1 that nobody uses, and that nobody is given by chance.

    It stays bound here without being listened on: the system hands it to nobody who
    asks for any port (as every connection does that is dialled), and a server that
    names it may bind it as well. Where only Linux allows the latter, it is let go.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    if sys.platform == "linux":
        if len(_held) == _held.maxlen:
            _held.popleft().close()
        _held.append(sock)
    else:
        sock.close()
    return port
