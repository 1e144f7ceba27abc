"""`pool.Pool` on a Ray cluster: the one place that knows Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ..errors import QkitError
from ..hardware.detect import cores
from ..progress import notify
from .pool import Lost, Node

# How often what a process was doing when it died, or its machine went away, is done again. Preemptible machines go all
# the time; a task that takes its process down does so every time.
RETRIES = 5
_REACH = 5.0  # seconds in which the address has to answer
_LOOK = 10.0  # seconds between looks at the cluster while nothing gets done
_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"  # an empty frame: length (3 bytes), type 4, flags, stream (4 bytes)
_START = "start Ray with `ray start --head`, on further machines with `ray start --address HOST:6379`"


class RayPool:
    """Tasks of the Ray session that this process is connected to.

    None is ever cancelled: the end of the session ends its tasks, and `ray.cancel` of a task that is just then done
    takes the whole driver down (Ray 2.60: a failed check in task_manager.cc)."""

    def __init__(self) -> None:
        self._functions: dict[Callable[..., Any], Any] = {}
        self._warned = False

    def nodes(self) -> list[Node]:
        import ray

        offers = (node["Resources"] for node in ray.nodes() if node["Alive"])
        return [Node(int(offer.get("CPU", 0)), int(offer.get("memory", 0))) for offer in offers]

    def submit(self, function: Callable[..., Any], *args: Any, cpus: int, memory: int) -> Any:
        import ray

        if function not in self._functions:
            self._functions[function] = ray.remote(function)
        options = {"num_cpus": cpus, "memory": memory, "max_retries": RETRIES, "retry_exceptions": False}
        return self._functions[function].options(**options).remote(*args)

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def wait(self, tickets: Collection[Any]) -> Any:
        import ray

        while True:
            done, _ = ray.wait(list(tickets), timeout=_LOOK)
            if done:
                return done[0]
            if not self._warned and not any(node.cpus for node in self.nodes()):
                self._warned = True
                notify("WARNING: no machine of the cluster is left; waiting for one to join")

    def result(self, ticket: Any) -> Any:
        import ray
        from ray import exceptions

        self.wait([ticket])
        try:
            return ray.get(ticket)
        except exceptions.RuntimeEnvSetupError as error:
            raise QkitError(f"the cluster cannot start a worker: {_in_short(error)}") from error
        except exceptions.OutOfMemoryError as error:
            raise QkitError(
                "a worker ran out of memory again and again", "give machines of the cluster fewer cores, or more memory"
            ) from error
        except exceptions.ObjectLostError as error:
            raise Lost(f"machines that are gone had what others need: {_in_short(error)}") from error
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError) as error:
            raise QkitError(
                f"a worker, or its machine, died {RETRIES + 1} times over one task: {_in_short(error)}",
                "look into Ray's logs there; the same command continues where this one stopped",
            ) from error
        except exceptions.RayTaskError as error:
            if "ModuleNotFoundError: No module named 'qkit" in str(error):
                raise QkitError(
                    "qkit is not installed where the workers run",
                    "pip install 'qkit-llm[ray]' on every machine, into the Python that its `ray start` runs in",
                ) from error
            raise


@contextlib.contextmanager
def connected(address: str) -> Iterator[RayPool]:
    """A pool on the cluster at `address` ("auto", "local", "HOST:6379", "ray://HOST:10001"), or on the one that this
    process is connected to already, which stays connected. Raises QkitError, soon, where there is none."""
    try:
        import ray
    except ImportError as error:
        raise QkitError(f"Ray does not start: {error}", "pip install 'qkit-llm[ray]'") from error
    if ray.is_initialized():
        yield RayPool()
        return
    _connect(address)
    try:
        yield RayPool()
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    # Nothing of a worker's is printed here; what it has to say it answers.
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that others started they decide
        given: dict[str, Any] = {"num_cpus": cores(), "include_dashboard": False}
    else:
        given = {"address": address}
        if address != "auto":
            _reach(address)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(**given, **quiet)
    except Exception as error:  # whatever another program's protocol makes of it
        hint = _START
        if isinstance(error, ImportError):
            hint = "pip install 'qkit-llm[ray]'"
        elif "ersion mismatch" in str(error):
            hint = "use one version of Ray and of Python everywhere"
        elif address not in ("auto", "local"):
            hint = f"{_START}; from a machine that is no part of the cluster name ray://HOST:10001"
        raise QkitError(f"no Ray cluster at {address}: {_in_short(error)}", hint) from error
    finally:
        if main:  # Ray puts its own there, with which a terminated run would not say that it can be continued
            signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Raises QkitError where nothing answers as Ray's servers do: Ray itself tries for minutes.

    They speak gRPC, which is HTTP/2 (RFC 9113, section 3.4): a server answers the greeting with a frame of settings."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":  # Ray's own setting: there is no greeting in the clear
                return
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
            found = connection.recv(len(_SETTINGS))
    except OSError as error:
        raise QkitError(f"no Ray cluster at {address}: {error.strerror or error}", _START) from error
    if found[3:4] != _SETTINGS[3:4]:
        hint = f"{_START}; its port is 6379 where none was named, and 10001 behind ray://"
        raise QkitError(f"no Ray cluster at {address}: something else answers there", hint)


def _in_short(error: Exception) -> str:
    """What an exception says, without the traceback of another process in the middle."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
