"""obstore and fsspec (s3fs) side by side: ranged reads of one object of a local S3 server, and what they take.

    python benchmarks/object_stores.py serve --megabytes 1024        # a plain server of one object; prints its URL
    python benchmarks/object_stores.py obstore URL                   # in an environment with obstore
    python benchmarks/object_stores.py s3fs URL                      # in one with s3fs
    python benchmarks/object_stores.py http URL                      # the ceiling: http.client of the standard library

URL ends in bucket/object; any S3 server that needs no particular credentials does. Each reader reads the whole object
in ranges, by 8 threads, three times: the median in MB/s, processor seconds of this process per GB, and how much more
is resident at the peak than before the first read. The import of the library is timed in a process of its own. The last
line of stdout is one JSON document. Nothing here imports qkit.
"""

from __future__ import annotations

import argparse
import http.client
import http.server
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

THREADS, REPEATS = 8, 3
Read = Callable[[int, int], int]  # (offset, bytes) -> bytes read


def serve(megabytes: int) -> None:
    """One object, bucket/object, of random bytes in memory; whatever a client signs is taken."""
    data = memoryview(os.urandom(1 << 20) * megabytes)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(200, 0, len(data), body=False)

        def do_GET(self) -> None:
            span = self.headers.get("Range")
            if span is None:
                self.answer(200, 0, len(data))
            else:
                first, last = span.removeprefix("bytes=").split("-")
                self.answer(206, int(first), min(int(last) + 1, len(data)))

        def answer(self, status: int, start: int, end: int, body: bool = True) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.end_headers()
            if body:
                self.wfile.write(data[start:end])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/bucket/object", flush=True)
    server.serve_forever()


def open_http(url: str) -> tuple[Read, int]:
    parts, local = urlsplit(url), threading.local()

    def ask(method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(parts.netloc)
        local.connection.request(method, parts.path, headers=headers)
        return local.connection.getresponse()

    head = ask("HEAD", {})
    head.read()
    return lambda at, n: len(ask("GET", {"Range": f"bytes={at}-{at + n - 1}"}).read()), int(
        head.headers["Content-Length"]
    )


def open_obstore(url: str) -> tuple[Read, int]:
    import obstore
    from obstore.store import S3Store

    parts = urlsplit(url)
    bucket, _, key = parts.path.strip("/").partition("/")
    store = S3Store(
        bucket, endpoint=f"{parts.scheme}://{parts.netloc}", region="us-east-1", access_key_id="a",
        secret_access_key="b", client_options={"allow_http": True},
    )  # fmt: skip
    found = obstore.head(store, key)
    get = obstore.get
    pin = found["e_tag"]
    return (
        lambda at, n: len(get(store, key, options={"range": (at, at + n), "if_match": pin}).bytes()),
        found["size"],
    )


def open_s3fs(url: str) -> tuple[Read, int]:
    import s3fs

    parts = urlsplit(url)
    fs = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=f"{parts.scheme}://{parts.netloc}")
    path = parts.path.strip("/")
    size = fs.info(path)["size"]
    return lambda at, n: len(fs.cat_file(path, start=at, end=at + n)), size


OPEN = {"http": open_http, "obstore": open_obstore, "s3fs": open_s3fs}
MODULE = {"http": "http.client", "obstore": "obstore", "s3fs": "s3fs"}


def import_seconds(name: str) -> float:
    code = f"import time; t = time.perf_counter(); import {MODULE[name]}; print(time.perf_counter() - t)"
    return statistics.median(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))


def measure(read: Read, size: int, step: int) -> dict[str, float]:
    before, rates, cpu = resource.getrusage(0), [], []
    for _ in range(REPEATS):
        started, used = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(THREADS) as pool:
            total = sum(pool.map(lambda at: read(at, min(step, size - at)), range(0, size, step)))
        assert total == size, f"{total} of {size} bytes"
        rates.append(size / 1e6 / (time.perf_counter() - started))
        cpu.append((time.process_time() - used) / (size / 1e9))
    grown = (resource.getrusage(0).ru_maxrss - before.ru_maxrss) / 1024
    return {"mb_per_s": statistics.median(rates), "cpu_s_per_gb": statistics.median(cpu), "peak_mib": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["serve", *OPEN])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--range", type=int, default=8, metavar="MIB")
    given = parser.parse_args()
    if given.what == "serve":
        return serve(given.megabytes)
    read, size = OPEN[given.what](given.url)
    found = {"library": given.what, "range_mib": given.range, "import_seconds": import_seconds(given.what)}
    found |= measure(read, size, given.range << 20)
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
