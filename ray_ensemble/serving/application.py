"""The Ray Serve application: routes, refusals, and one batch queue for all datasets and adapters of a replica."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from ray_ensemble.config import ServingConfig
from ray_ensemble.ensemble import Predictor
from ray_ensemble.ensemble.prediction import Request
from ray_ensemble.errors import InputError
from ray_ensemble.serving.requests import Refused, answers, parse_body

_METHODS = {"/predict": "POST", "/tasks": "GET", "/healthz": "GET"}


class Endpoint:
    """One replica: a base with all adapters of a run, and the requests that wait for it.

    Args:
        folder: the run folder.
        config: how to serve it.
        threads: of the base's arithmetic.
        token_hash: SHA-256 of the token that requests must carry, in hexadecimal; None where none is asked for. The token itself
            is not sent through Ray.
    """

    def __init__(self, folder: str, config: ServingConfig, threads: int, token_hash: str | None) -> None:
        import torch

        torch.set_num_threads(threads)
        self._config, self._token_hash = config, token_hash
        self._predictor = Predictor(folder, merged=config.merged)
        # The arithmetic has a thread of its own, so that refusals and health checks do not wait for it.
        self._thread = ThreadPoolExecutor(max_workers=1)

        async def answer(requests: list[Request]) -> list[Any]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, answers, self._predictor.predict, requests)

        # Wrapped here and not above, since the sizes are the caller's.
        self._answer = serve.batch(max_batch_size=config.batch_size, batch_wait_timeout_s=config.batch_wait)(answer)

    async def __call__(self, request: HttpRequest) -> JSONResponse:
        """Answer one HTTP request; every refusal is `{"error": reason}`."""
        try:
            return JSONResponse(await self._respond(request))
        except Refused as refused:
            headers = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": _METHODS.get(request.url.path, "")}}
            return JSONResponse({"error": str(refused)}, refused.status, headers.get(refused.status))

    async def _respond(self, request: HttpRequest) -> Any:
        path = request.url.path
        if path not in _METHODS:
            raise Refused(404, f"no path {path[:80]} (paths: {', '.join(_METHODS)})")
        if request.method != _METHODS[path]:
            raise Refused(405, f"{path} takes {_METHODS[path]}, not {request.method}")
        if path == "/healthz":
            return {"status": "ok"}
        self._check_token(request)
        if path == "/tasks":
            return {
                "tasks": [
                    {"name": name, "prompt": task.prompt, "fields": list(task.fields), "labels": list(task.labels)}
                    for name, task in self._predictor.tasks.items()
                ]
            }
        rows, listed = parse_body(await self._body(request), self._predictor.tasks, self._config.max_rows)
        found = await asyncio.gather(*map(self._answer, rows))
        for number, answer in enumerate(found, start=1):
            if isinstance(answer, InputError):
                raise Refused(422, f"row {number}: {answer}" if listed else str(answer))
        return found if listed else found[0]

    def _check_token(self, request: HttpRequest) -> None:
        if self._token_hash is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token_hash):
            raise Refused(401, "a token is needed: the header 'Authorization: Bearer <token>'")

    async def _body(self, request: HttpRequest) -> bytes:
        limit = self._config.max_body_bytes
        length = request.headers.get("content-length", "")
        body = b""
        try:
            if not (length.isdigit() and int(length) > limit):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        break
                else:
                    return body
        except ClientDisconnect:
            raise Refused(400, "the client went away before its body was read") from None
        raise Refused(413, f"the body is too long; at most {limit} bytes are taken")
