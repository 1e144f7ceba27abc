"""`pool.Pool`s without a cluster: what they call, what it takes and what it gives is pickled, in random order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
from collections.abc import Callable, Collection
from typing import Any

import torch

from qkit.conversion.pool import Node

GIB = 1 << 30

Use = Callable[[Any], Any]


class Ticket(int):
    """Of a call, or of a value."""


class Here:
    """Runs what it is given in this process, when it is waited for."""

    def __init__(self, nodes: tuple[Node, ...] = (Node(2, 8 * GIB), Node(0, GIB), Node(4, 8 * GIB))):
        self.offered = list(nodes)
        self.random = random.Random(0)
        self.sent: list[bytes] = []
        self.asked: list[tuple[int, int]] = []
        self.done: dict[int, Any] = {}
        self.put_there: list[bytes] = []

    def nodes(self) -> list[Node]:
        return self.offered

    def submit(self, function: Callable[..., Any], *args: Any, cpus: int, memory: int) -> Ticket:
        self.sent.append(pickle.dumps((function, args), 5))
        self.asked.append((cpus, memory))
        return Ticket(len(self.sent) - 1)

    def put(self, value: Any) -> Ticket:
        ticket = Ticket(-len(self.put_there) - 1)
        self.put_there.append(pickle.dumps(value, 5))
        return ticket

    def wait(self, tickets: Collection[Ticket]) -> Ticket:
        return self.random.choice(sorted(tickets))

    def result(self, ticket: Ticket) -> Any:
        if ticket < 0:
            return pickle.loads(self.put_there[-ticket - 1])
        if ticket not in self.done:
            function, args = pickle.loads(self.sent[ticket])
            resolved = tuple(self.result(arg) if isinstance(arg, Ticket) else arg for arg in args)
            self.done[ticket] = self.call(pickle.dumps((function, resolved), 5))
        return pickle.loads(self.done[ticket])

    def call(self, sent: bytes) -> bytes:
        threads = torch.get_num_threads()
        try:
            return called(sent)
        finally:
            torch.set_num_threads(threads)  # a worker changes its own


class Elsewhere(Here):
    """Each call in a process of its own, of which the second dies when it has written a file, before that gets a name;
    as by Ray, it is done again.

    The processes are forked, which is quick, and have one core each: OpenMP does not outlive a fork with more."""

    def __init__(self) -> None:
        super().__init__((Node(1, 8 * GIB), Node(1, 8 * GIB)))
        self.processes = self.deaths = 0

    def call(self, sent: bytes) -> bytes:
        context = multiprocessing.get_context("fork")
        while True:
            ours, theirs = context.Pipe()
            self.processes += 1
            process = context.Process(target=answer, args=(theirs, sent, self.processes == 2))
            process.start()
            theirs.close()
            try:
                return ours.recv()
            except EOFError:
                self.deaths += 1
            finally:
                process.join()


def answer(connection: Any, sent: bytes, die: bool) -> None:
    torch.set_num_threads(1)
    if die:
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    connection.send(called(sent))


def called(sent: bytes) -> bytes:
    function, args = pickle.loads(sent)
    return pickle.dumps(function(*args), 5)
