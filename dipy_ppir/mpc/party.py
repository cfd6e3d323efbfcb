"""The process of a party that a loopback session starts: ``python -m ...party``.

It reads its number, the session's token and the addresses from standard input,
meets the other parties over TCP on the loopback interface, then runs the tasks
that its parent sends until the pipe closes. When the parent dies, however it
dies, the pipe closes and this process ends.
"""

import importlib
import os
import signal
import sys
import threading
import traceback

from dipy_ppir.mpc.descriptors import fill_standard_descriptors


def meet(pid, token, addresses, listener, timeout, check=None, parties=3):
    """Connect this party to the others over loopback TCP and authenticate.

    Lower numbers listen, higher numbers dial.

    Parameters
    ----------
    pid : int
    token : bytes
        the session's secret.
    addresses : dict
        maps party numbers to (host, port).
    listener : socket or None
        listening socket of this party; None for the last party.
    timeout : float
    check : callable, optional
        called while waiting; may raise to give up early.
    parties : int, optional
        3, or 2 for two owners alone.

    Returns
    -------
    session : Session
        of two owners alone a `PairSession`.

    Raises
    ------
    PeerLostError
        if nobody listens where a party should, or not any more.
    PeerTimeoutError
        naming who did not come.
    """
    import socket
    import time

    from dipy_ppir.mpc.authentication import authenticate
    from dipy_ppir.mpc.errors import PeerError, PeerLostError, PeerTimeoutError
    from dipy_ppir.mpc.ledger import ROLES
    from dipy_ppir.mpc.link import Link
    from dipy_ppir.mpc.pair import PairSession
    from dipy_ppir.mpc.session import Session

    kind = PairSession if parties == 2 else Session
    links, seeds = {}, {}
    try:
        for peer in sorted(p for p in kind.roles if p < pid):
            try:
                sock = socket.create_connection(addresses[peer], timeout)
                links[peer] = Link(sock, peer)
                sock.sendall(bytes([pid]))
            except ConnectionError as exc:
                raise PeerLostError(
                    f"party {peer} ({ROLES[peer]}) cannot be reached: {exc.strerror}; "
                    "start it first",
                    peer,
                ) from None
            seeds[peer] = authenticate(links[peer], pid, token, timeout=timeout)
        waiting = {p for p in kind.roles if p > pid}
        deadline = time.monotonic() + timeout
        while waiting:
            listener.settimeout(0.2)
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                if check is not None:
                    check()
                if time.monotonic() > deadline:
                    raise
                continue
            sock.settimeout(timeout)
            try:
                claimed = sock.recv(1)
            except OSError:
                claimed = b""
            peer = claimed[0] if claimed else -1
            if peer not in waiting:
                sock.close()
                continue
            link = Link(sock, peer)
            try:
                seeds[peer] = authenticate(link, pid, token, timeout=timeout)
            except PeerError:
                # A stranger on this machine: turn it away and go on waiting.
                sock.close()
                continue
            links[peer] = link
            waiting.discard(peer)
    except BaseException as exc:
        for link in links.values():
            link.sock.close()
        if not isinstance(exc, TimeoutError):
            raise
        missing = sorted(set(kind.roles) - {pid} - set(seeds))
        names = ", ".join(f"party {p} ({ROLES[p]})" for p in missing)
        raise PeerTimeoutError(
            f"{names} did not connect within {timeout:g} s", missing[0]
        ) from None
    finally:
        if listener is not None:
            listener.close()
    return kind(pid, links, seeds, timeout=timeout)


def resolve(path):
    """The function named ``package.module:function``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def serve(commands, replies):
    """Run this party until its parent closes the pipe."""
    from dipy_ppir.mpc.errors import PeerError
    from dipy_ppir.mpc.pipes import read_message, write_message

    def receive():
        try:
            return read_message(commands)
        except EOFError:
            os._exit(0)

    setup = receive()
    addresses = {int(p): tuple(a) for p, a in setup["addresses"].items()}
    listener = None
    if setup["listen_fd"] is not None:
        import socket

        listener = socket.socket(fileno=setup["listen_fd"])
    try:
        session = meet(
            setup["pid"],
            bytes.fromhex(setup["token"]),
            addresses,
            listener,
            setup["timeout"],
            parties=setup["parties"],
        )
    except PeerError:
        return  # the parent waits for the same parties, and says who is missing
    session.network.timeout = setup["silence"]
    write_message(replies, {"ok": True})
    while True:
        task = receive()
        session.new_run()
        try:
            result = resolve(task["call"])(session, **task["arguments"])
            sent = session.ledger.sent_by_phase()
            write_message(replies, {"ok": True, "result": result, "sent": sent})
        except BaseException as exc:
            session.fail(exc)
            reply = {
                "ok": False,
                "error": type(exc).__name__,
                "module": type(exc).__module__,
                "message": str(exc),
                "traceback": traceback.format_exc(),
            }
            try:
                write_message(replies, reply)
            except OSError:
                pass  # the parent is gone as well
            return


def _watch(commands_fd):
    """End this process as soon as the parent's end of the pipe is closed."""
    import select

    poller = select.poll()
    poller.register(commands_fd, 0)
    while True:
        for _, event in poller.poll():
            if event & (select.POLLHUP | select.POLLERR):
                os._exit(0)


def main():
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fill_standard_descriptors()
    # Replies go to a private copy of standard output, so that nothing a library
    # prints can be taken for one.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    watcher = threading.Thread(target=_watch, args=(0,), daemon=True)
    watcher.start()
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
