"""A TCP relay in the way of a connection, which can be made to swallow everything as a partition does: nobody is told.

Bytes that were swallowed are kept and delivered when the partition heals, as TCP would by sending them again.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import Self


class Proxy:
    """Relays `address` to `target` in a thread of its own."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._is_cut = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._is_over = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return "{}:{}".format(*self._listener.getsockname())

    def cut(self) -> None:
        """Let nothing through. Connections stay open; new ones are accepted by nobody who answers."""
        self._is_cut = True

    def heal(self) -> None:
        """Let through what was held back, and all that comes."""
        self._is_cut = False
        self._wake_write.send(b"h")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._wake_write.send(b"q")
        self._thread.join()
        for sock in [self._listener, self._wake_read, self._wake_write, *self._peers]:
            sock.close()
        self._selector.close()

    def _run(self) -> None:
        held: set[socket.socket] = set()
        while not self._is_over:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._wake_read:
                    sock.recv(16)
                    for one in held:
                        self._selector.register(one, selectors.EVENT_READ)
                    held.clear()
                elif sock is self._listener:
                    self._accept()
                elif self._is_cut:
                    self._selector.unregister(sock)
                    held.add(sock)
                elif sock in self._peers:
                    self._relay(sock)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            self._peers[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _relay(self, sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = sock.recv(65536)
        peer = self._peers[sock]
        if data:
            with contextlib.suppress(OSError):
                peer.sendall(data)
            return
        for one in (sock, peer):
            self._peers.pop(one, None)
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(one)
            one.close()
