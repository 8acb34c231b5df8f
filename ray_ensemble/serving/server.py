"""`ray-ensemble serve`: Ray Serve from the start to a clean end."""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_ensemble.config import GradientsConfig, ServingConfig, load_config
from ray_ensemble.errors import InputError, RunError
from ray_ensemble.pool import PoolSize, bundle_of
from ray_ensemble.runtime import cluster_cpus, ray_session
from ray_ensemble.serving.requests import tasks_of
from ray_ensemble.storage import run_files, run_place

TOKEN = "RAY_ENSEMBLE_TOKEN"  # noqa: S105 (the variable's name)
_NAME = "ray-ensemble"
_LOOK_SECONDS = 5.0  # between looks at whether the application still lives


def serve_run(folder: str | Path, config: ServingConfig) -> None:
    """Serve a finished run over HTTP until this process gets SIGINT or SIGTERM.

    With RAY_ENSEMBLE_TOKEN set, requests must carry it as a bearer token.

    Raises:
        InputError: the run is not that far, the port is taken, an empty token, or Ray Serve is not installed.
        RunError: the replicas did not start, or the application failed later.
    """
    place = run_place(folder)
    run = place if isinstance(place, str) else str(place.resolve())
    tasks = tasks_of(run)
    gradients = load_config(run_files(run) / "config.yaml").gradients
    token = os.environ.get(TOKEN)
    if token is not None and not token.strip():
        raise InputError(f"{TOKEN} is set but empty; give it a value, or unset it to serve without a token")
    _check_installed()
    if not os.environ.get("RAY_ADDRESS"):
        check_address(config)
    if token is None and not _is_loopback(config.host):
        print(
            f"warning: {config.host} can be reached from other machines and no token is asked for: whoever reaches it can use "
            f"it; set {TOKEN}",
            file=sys.stderr,
            flush=True,
        )
    token_hash = hashlib.sha256(token.strip().encode()).hexdigest() if token is not None else None
    with ray_session():
        address = _address(config, token is not None)
        try:
            _deploy(run, config, gradients, token_hash)
            print(
                f"serving {len(tasks)} datasets on {address} "
                f"({'merged adapters' if config.merged else 'ensembles'}, replicas: {config.replicas}); Ctrl-C ends it",
                flush=True,
            )
            with _signals() as stop:
                while not stop.wait(_LOOK_SECONDS):
                    _check_alive()
        except KeyboardInterrupt:  # while it was starting
            pass
        finally:
            print("shutting down", flush=True)
            _end()


def check_address(config: ServingConfig) -> None:
    """Refuse an address that cannot be listened on. Ray Serve shares a port with whoever has it, without a word.

    Raises:
        InputError: the host is none of this machine's, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # A server that ended a moment ago is not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "this is no host"
        raise InputError(
            f"--host {config.host} --port {config.port}: cannot listen there ({reason}); choose another"
        ) from None


def _address(config: ServingConfig, asks_token: bool) -> str:
    """Where the server will be, in words: a cluster that serves other applications keeps the address that it has.

    Raises:
        InputError: the cluster serves a run already.
    """
    from ray import serve

    status = serve.status()
    if _NAME in status.applications:
        raise InputError("this cluster serves a run already, and one at a time; end that server first")
    if not status.proxies:
        host = f"[{config.host}]" if ":" in config.host else config.host
        return f"http://{host}:{config.port}"
    print(
        "note: this cluster runs Ray Serve already: it keeps its address, and --host and --port change nothing"
        + ("" if asks_token else f"; whoever reaches it can use the run, unless {TOKEN} is set"),
        file=sys.stderr,
        flush=True,
    )
    return "the address that Ray Serve has there"


def _check_installed() -> None:
    if importlib.util.find_spec("starlette") is None:
        raise InputError(
            "serve needs Ray Serve, which is not installed; install it with: pip install 'ray-ensemble[serve]'"
        )


def _deploy(run: str, config: ServingConfig, gradients: GradientsConfig, token_hash: str | None) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    threads = gradients.threads
    if config.replicas * threads > cluster_cpus():
        print(
            f"{config.replicas} replicas want {config.replicas * threads} CPUs and the cluster holds {cluster_cpus()}: "
            "waiting until it grows",
            file=sys.stderr,
            flush=True,
        )
    from ray_ensemble.serving.application import Endpoint

    gpus = bundle_of(gradients, PoolSize(config.replicas, config.replicas)).get("GPU", 0.0)
    deployment = serve.deployment(Endpoint).options(
        num_replicas=config.replicas,
        # One batch under way and one that fills up; what comes beyond waits in the proxy, up to `queue`.
        max_ongoing_requests=2 * config.batch_size,
        max_queued_requests=config.queue,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
    )
    try:
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
        application: Any = deployment.bind(str(run), config, threads, token_hash)
        serve.run(application, name=_NAME, logging_config={"enable_access_log": False, "log_level": "WARNING"})
    except (RuntimeError, RayError, RayServeException) as error:
        prefix = f"{InputError.__module__}.{InputError.__name__}: "
        reasons = [line.partition(prefix)[2] for line in str(error).splitlines() if prefix in line]
        if reasons:
            raise InputError(reasons[-1]) from None
        raise RunError(f"the server did not start: {error}") from error


def _check_alive() -> None:
    from ray import serve

    status = serve.status().applications.get(_NAME)
    if status is None:
        raise RunError("the server was taken off the cluster by someone else")
    if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise RunError(f"the server failed: {status.message}")


def _end() -> None:
    """Take the application off the cluster, however far it got."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if os.environ.get("RAY_ADDRESS"):
        with suppress(RayServeException):  # no server was started
            serve.delete(_NAME)  # the cluster may serve other applications
    else:
        serve.shutdown()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; Ray has put handlers of its own in place before."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
