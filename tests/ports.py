"""Ports of this machine for programs that bind them themselves."""

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


def free_port(count=1):
    """A port that nobody uses, and that nobody is given by chance.

    It stays bound here without being listened on: the system hands it to nobody who
    asks for any port (as every connection does that is dialled), and a server that
    names it may bind it as well, at any address. Where only Linux allows the latter,
    it is let go.

    Parameters
    ----------
    count : int, optional
        how many of them, one after the other.

    Returns
    -------
    port : int
        the first.
    """
    while True:
        socks = []
        try:
            socks.append(_bound(0))
            port = socks[0].getsockname()[1]
            for n in range(1, count):
                socks.append(_bound(port + n))
        except (OSError, OverflowError):
            if not socks:
                raise
            for sock in socks:  # somebody has the next one
                sock.close()
            continue
        for sock in socks:
            _hold(sock)
        return port


def _bound(port):
    sock = socket.socket()
    try:
        # Before it may be shared: others hold ports as well.
        sock.bind(("", port))
    except BaseException:
        sock.close()
        raise
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _hold(sock):
    if sys.platform != "linux":
        sock.close()
        return
    if len(_held) == _held.maxlen:
        _held.popleft().close()
    _held.append(sock)
