"""Start the server of a finished run, ask it 200 things at once, and hold its answers against those of `predict`.

    python examples/serve_client.py runs/demo
    python examples/serve_client.py runs/demo --requests 1000 --concurrency 64 --merged

The requests are test rows of all datasets of the run, mixed. Malformed ones are sent among them, which have to be refused with a
reason. Prints throughput and latencies; ends with exit code 1 if an answer differs or a bad request gets through.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from ray_ensemble.config import load_config
from ray_ensemble.storage import run_files, run_place
from ray_ensemble.tasks import load_tasks

MALFORMED = [
    (b'{"task": ', 400),
    (b'{"text": "no task"}', 422),
    (b'{"task": "no such task", "text": "x"}', 422),
    (b"[3]", 422),
    (b" " * (2**20 + 1), 413),
]


def mixed_rows(run: str, count: int) -> list[dict[str, Any]]:
    """Test rows of the run's datasets in a random order that is always the same; fewer rows than `count` come again."""
    config = load_config(run_files(run_place(run)) / "config.yaml")
    rows = [
        {"task": task.name, **example.fields}
        for task in load_tasks(config.tasks, config.limits, Path.cwd())
        for example in task["test"]
    ]
    random.Random(0).shuffle(rows)  # noqa: S311
    return [rows[i % len(rows)] for i in range(count)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def verb(name: str, run: str, *options: str) -> list[str]:
    """A command line of ray-ensemble, with this Python."""
    return [sys.executable, "-m", "ray_ensemble.cli", name, run, *options]


async def healthy(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until the server answers."""
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with exit code {server.returncode}")
            try:
                async with session.get(f"{url}/healthz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise SystemExit(f"the server did not answer within {seconds:.0f} s")


async def ask(
    url: str, rows: list[dict[str, Any]], concurrency: int
) -> tuple[list[tuple[int, Any]], list[float], list[tuple[int, int, Any]]]:
    """Statuses and answers of the rows, their latencies in seconds, and (wanted, found, answer) of malformed requests."""
    headers = (
        {"Authorization": f"Bearer {os.environ['RAY_ENSEMBLE_TOKEN']}"} if "RAY_ENSEMBLE_TOKEN" in os.environ else {}
    )
    places = asyncio.Semaphore(concurrency)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:

        async def one(body: bytes) -> tuple[int, Any, float]:
            async with places:
                started = time.monotonic()
                async with session.post(f"{url}/predict", data=body) as response:
                    answer = await response.json(content_type=None)
                    return response.status, answer, time.monotonic() - started

        good = [one(json.dumps(row).encode()) for row in rows]
        bad = [one(body) for body, _ in MALFORMED]
        found = await asyncio.gather(*good, *bad)
    answered, refused = found[: len(rows)], found[len(rows) :]
    wanted = [status for _, status in MALFORMED]
    return (
        [(status, answer) for status, answer, _ in answered],
        [seconds for *_, seconds in answered],
        [(want, status, answer) for want, (status, answer, _) in zip(wanted, refused, strict=True)],
    )


def predicted(run: str, rows: list[dict[str, Any]], merged: bool) -> list[dict[str, Any]]:
    """What `ray-ensemble predict` says of the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "rows.jsonl", Path(folder) / "answers.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = ["--input", str(source), "--output", str(target), *(["--merged"] if merged else [])]
        subprocess.run(verb("predict", run, *options), check=True)  # noqa: S603
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def differences(
    answers: list[tuple[int, Any]], expected: list[dict[str, Any]], tolerance: float
) -> tuple[list[str], float]:
    """What is wrong with the answers, and the largest difference of a probability."""
    wrong, largest = [], 0.0
    for number, ((status, answer), theirs) in enumerate(zip(answers, expected, strict=True)):
        if status != 200:
            wrong.append(f"request {number}: status {status}, {answer}")
            continue
        gap = max(abs(answer["probabilities"][label] - p) for label, p in theirs["probabilities"].items())
        largest = max(largest, gap)
        if gap > tolerance or answer["label"] != theirs["label"]:
            wrong.append(f"request {number}: {answer}, predict says {theirs}")
    return wrong, largest


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder, or its URL")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=200, help="requests under way at once")
    parser.add_argument("--merged", action="store_true", help="as for serve and predict")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of a probability, for other batches round otherwise"
    )
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds for the server to start")
    options = parser.parse_args()

    rows = mixed_rows(options.run, options.requests)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    merged = ["--merged"] if options.merged else []
    server = subprocess.Popen(verb("serve", options.run, "--port", str(port), *merged))  # noqa: S603
    try:
        asyncio.run(healthy(url, server, options.start_timeout))
        asyncio.run(ask(url, rows[:8], 8))  # the first batch is slower
        started = time.monotonic()
        answers, latencies, refused = asyncio.run(ask(url, rows, options.concurrency))
        seconds = time.monotonic() - started
        server.send_signal(signal.SIGINT)
        code = server.wait(120)
    finally:
        if server.poll() is None:
            server.kill()
    wrong, largest = differences(answers, predicted(options.run, rows, options.merged), options.tolerance)
    for want, status, answer in refused:
        if status != want or not (isinstance(answer, dict) and answer.get("error")):
            wrong.append(f"a malformed request got {status} and {answer}, not {want} and a reason")
    if code != 0:
        wrong.append(f"the server ended with exit code {code} on Ctrl-C")
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    print(
        f"{len(rows)} requests over {len({row['task'] for row in rows})} datasets, {options.concurrency} at once: "
        f"{len(rows) / seconds:.1f}/s; latency p50 {p50:.3f} s, p95 {p95:.3f} s, p99 {p99:.3f} s"
    )
    print(f"largest difference of a probability from predict: {largest:.1e}")
    for _, status, answer in refused:
        print(f"malformed: {status} {answer.get('error') if isinstance(answer, dict) else answer}")
    for line in wrong[:10]:
        print(f"WRONG: {line}", file=sys.stderr)
    print(f"{'FAILED, ' + str(len(wrong)) + ' wrong' if wrong else 'all as predict says'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
