"""Copies of a process, made on orders of the one that started it."""

import gc
import os
import select
import signal


def fork_on_orders(control, receive, say, forked=lambda order: None):
    """Obey orders; returns in the new processes only, each with its order.

    Whoever gives orders is told what was started and how it ended; where it ends
    itself, so do all that were started.

    Parameters
    ----------
    control : int
        descriptor that orders come from.
    receive : callable
        ``receive()`` returns orders, dicts, or None where there will be no more. Those
        with the entries "kill" and "signal" send a process a signal, all others start
        one.
    say : callable
        ``say(key, value)`` tells the number of a process that was "started", or by the
        number of one that ended its exit status.
    forked : callable, optional
        called with an order when its process has been started.

    Returns
    -------
    order : dict
    """
    gc.collect()
    gc.freeze()
    bell, rope = os.pipe()
    os.set_blocking(rope, False)
    signal.set_wakeup_fd(rope)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children = set()
    while True:
        ready = select.select([control, bell], [], [])[0]
        if bell in ready:
            os.read(bell, 1 << 12)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                children.remove(ended[0])
                say(ended[0], os.waitstatus_to_exitcode(ended[1]))
        if control not in ready:
            continue
        orders = receive()
        if orders is None:
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
            os._exit(0)
        for order in orders:
            if "kill" in order:
                if order["kill"] in children:
                    os.kill(order["kill"], order["signal"])
                continue
            child = os.fork()
            if not child:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(bell)
                os.close(rope)
                return order
            forked(order)
            children.add(child)
            say("started", child)
