"""Runs inside an environment with Ray and qkit: a cluster of several machines' worth of raylets on this one.

Usage: client_ray.py JOB.json, where the job is {"source": folder, "out": dir, "formats": {name: options}, "slow":
options, "gguf": options, "calibrated": options}. Converts with --ray while machines, workers and drivers die; each
scenario's folder is out/<scenario>. Prints one JSON document: scenario -> what happened.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from qkit.conversion.run import convert
from qkit.conversion.workspace import partial_dir
from qkit.errors import QkitError
from qkit.storage.manifest import Manifest

MACHINES = 3  # that take tasks, beside the head, which takes none


def start() -> tuple[Cluster, list[Any], str]:
    """(cluster, its machines, address for clients that are no part of it)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "ray_client_server_port": port, **small})
    machines = [cluster.add_node(num_cpus=1, **small) for _ in range(MACHINES)]
    cluster.wait_for_nodes()
    return cluster, machines, f"ray://127.0.0.1:{port}"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def writer(part: Path) -> int | None:
    """A process that is writing a file of weights there."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                names = [os.readlink(fd) for fd in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(name.startswith(f"{part}/.model-") for name in names):
                return int(process.name)
    return None


def noted(part: Path) -> int:
    """How many files the driver has noted as finished."""
    try:
        found = Manifest.find(part)
    except (OSError, QkitError):  # it is just being replaced
        return 0
    return 0 if found is None else len(found.files)


def raylet_of(machine: Any) -> int:
    pid: int = machine.all_processes["raylet"][0].process.pid
    return pid


def while_writing(out: Path, act: Callable[[int], None]) -> tuple[threading.Thread, dict[str, Any]]:
    """Call act(pid of a worker) while it writes a file, one is finished already, and others are not begun."""
    part, seen = partial_dir(out), {}

    def watch() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            done = noted(part)
            pid = writer(part) if done else None
            if pid is not None:
                seen.update(pid=pid, finished=done)
                act(pid)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, seen


def while_calibrating(out: Path, act: Callable[[], None]) -> tuple[threading.Thread, dict[str, Any]]:
    """Call act() in the middle of a decoder block, once another is finished."""
    part, seen = partial_dir(out), {}

    def watch() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and noted(part) < 2:  # what belongs to no block, and a block
            time.sleep(0.01)
        seen["finished"] = noted(part)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, seen


def worker_of(raylets: list[int]) -> int:
    """A process that a raylet which is still there has started, and that computes."""
    alive = [pid for pid in raylets if Path(f"/proc/{pid}").exists()]
    while True:
        for process in Path("/proc").iterdir():
            try:
                mine = process.name.isdigit() and b"ray::run_step" in (process / "cmdline").read_bytes()
                if mine and parent_of(int(process.name)) in alive:
                    return int(process.name)
            except OSError:
                continue


def converted(source: str, out: Path, address: str | None, options: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    result = convert(source, out, ray=address, **options)
    return {"files": len(result.plan.shards), "resumed": result.resumed, "seconds": time.monotonic() - started}


def command(source: str, out: Path, address: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    words = [f"--{n.replace('_', '-')}" + ("" if v is True else f"={v}") for n, v in options.items()]
    line = [sys.executable, "-m", "qkit", "convert", source, "-o", str(out), "--ray", address, *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cut(source: str, out: Path, address: str, options: dict[str, Any], sig: int) -> dict[str, Any]:
    """A driver that gets a signal once some of its files are finished."""
    run = command(source, out, address, options)
    thread, seen = while_writing(out, lambda pid: run.send_signal(sig))
    stderr = run.communicate()[1]
    thread.join()
    return {**seen, "code": run.returncode, "stderr": stderr, "out": out.exists()}


def unreachable(source: str, out: Path) -> dict[str, Any]:
    """An address where nothing is, and one where something else says nothing at all."""
    found = {}
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        closed.bind(("127.0.0.1", 0))
        silent.listen()
        for name, bound in (("silent", silent), ("closed", closed)):
            started = time.monotonic()
            try:
                converted(source, out, f"127.0.0.1:{bound.getsockname()[1]}", {"method": "rtn"})
            except QkitError as error:
                found[name] = {"message": error.message, "hint": error.hint, "seconds": time.monotonic() - started}
    return found


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    source, out, slow = job["source"], Path(job["out"]), job["slow"]
    said: dict[str, Any] = {"unreachable": unreachable(source, out / "unreachable")}
    cluster, machines, client = start()
    raylets = [raylet_of(machine) for machine in machines]
    said["cut by Ctrl-C"] = cut(source, out / "cut", cluster.address, slow, signal.SIGINT)
    said["cut by a kill"] = cut(source, out / "cut", cluster.address, slow, signal.SIGKILL)
    said["cut, then here"] = converted(source, out / "cut", None, slow)
    for _ in range(3):  # on a busy machine Ray's proxy gives the server that it starts for a client too little time
        run = command(source, out / "client", client, job["formats"]["gptq"])
        said["client"] = {"stderr": run.communicate()[1], "code": run.returncode}
        if "Initialization failure" not in said["client"]["stderr"]:
            break

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # its workers serve all that follows
    for name, options in job["formats"].items():
        said[name] = converted(source, out / name, cluster.address, options)
    said["gguf"] = converted(source, out / "gguf", cluster.address, job["gguf"])

    thread, seen = while_writing(out / "worker", lambda pid: os.kill(pid, signal.SIGKILL))
    said["worker"] = {**converted(source, out / "worker", cluster.address, slow), **seen}
    thread.join()

    def lose(pid: int) -> None:
        """The machine of a worker: all at once, as when its power fails."""
        raylet = parent_of(pid)
        for gone in (raylet, pid):
            os.kill(gone, signal.SIGKILL)
        cluster.remove_node(machines[raylets.index(raylet)], allow_graceful=False)

    said["calibrated"] = converted(source, out / "calibrated", cluster.address, job["calibrated"])

    thread, seen = while_writing(out / "machine", lose)
    said["machine"] = {**converted(source, out / "machine", cluster.address, slow), **seen}
    thread.join()
    said["machine"]["left"] = sum(Path(f"/proc/{pid}").exists() for pid in raylets)

    thread, seen = while_calibrating(out / "block", lambda: lose(worker_of(raylets)))
    said["block"] = {**converted(source, out / "block", cluster.address, job["calibrated"]), **seen}
    thread.join()
    said["block"]["left"] = sum(Path(f"/proc/{pid}").exists() for pid in raylets)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
