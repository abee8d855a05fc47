"""The server's life: load the run, listen on the loopback interface, end when it is told to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from hpcmm.config import config_file
from hpcmm.config.schema import RunConfig
from hpcmm.config.validate import check_model
from hpcmm.config.workload import workload_of
from hpcmm.errors import HpcmmError
from hpcmm.node.cache import private_folder
from hpcmm.node.network import hold_free_port, peer_uid
from hpcmm.runs.run_dir import RunDir
from hpcmm.serve.address import Address, new_token, this_host
from hpcmm.serve.guard import HEAD_LIMIT_BYTES, PROVED, Guard
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.served import ServedModel, ServedPage
from hpcmm.serve.service import RequestLog, Service
from hpcmm.text import printable

LOOPBACK = "127.0.0.1"
CSS = Path(__file__).with_name("page.css")
"""Of all pages."""
_SESSIONS = 500
"""Open pages of which the server remembers what they show."""
_CONNECTIONS = 400
_ACCEPTED_AT_ONCE = 128
"""Few, since a connection that is closed at once has a file descriptor until the next turn of the event loop."""
_PROOF_S = 15.0
"""Time for a connection to bring the token."""
_MOST_UNPROVED = 100
_KEPT_S = 900
"""How long an upload stays in the server's private folder."""
_SWEEP_S = 30.0
_IDLE_S = 0.02
"""Between two looks of gradio's queue at itself, which are 1 ms by default: a tenth of a core of an idle server."""
_GRACE_S = 3
_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]


def serve(
    options: ServeOptions,
    ready: Callable[[Address], None],
    asked_to_end: Callable[[], bool] = lambda: False,
    node: str | None = None,
) -> None:
    """Serve until SIGTERM, SIGHUP, Ctrl-C or ``asked_to_end``. ``ready`` is told the address once it answers.

    Call it in the main thread. Raises HpcmmError if the run cannot be served.
    """
    with ExitStack() as stack:
        held = stack.enter_context(_listening(options.port))
        cache = stack.enter_context(private_folder("hpcmm-serve-"))  # for uploads
        _settle_gradio(cache)
        page, service = load_page(options)
        stack.callback(service.close)
        address = Address(node or this_host(), int(held.getsockname()[1]), new_token())
        _run(build_app(page, service, cache, address), held, cache, lambda: ready(address), asked_to_end)


def load_page(options: ServeOptions) -> tuple[ServedPage, Service[Any, Any]]:
    """The page of a run with its model, and what its users share. Raises HpcmmError with what is missing."""
    from hpcmm.train.checkpoint import load_model  # noqa: PLC0415 -- both import torch
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415

    select_accelerator()
    run = RunDir(Path(options.run))
    config = config_file.load(run.config)
    served = served_model_of(run, config)
    check_model(config, run.config)
    print(f"hpcmm.serve: loading the model of {printable(run.root.name)}.", file=sys.stderr, flush=True)
    model = load_model(run, lambda: served.build_model(config))
    log = RequestLog(run.requests_log)
    page = served.load(model, run, config, options)
    return page, Service(page.predict, options, log)


def served_model_of(run: RunDir, config: RunConfig) -> ServedModel:
    """How the run's workload is served. Raises HpcmmError if its task has no page."""
    workload = workload_of(config)
    served = None if workload is None else workload.served()
    if served is None:
        raise HpcmmError(f"The task {config.task.name} of {run.root} has no page to serve: name a run of a workload.")
    return served


def build_app(page: ServedPage, service: Service[Any, Any], cache: Path, address: Address) -> Any:
    """The ASGI application: the workload's page in gradio, and the guard in front."""
    import gradio  # noqa: PLC0415 -- takes seconds
    from fastapi import FastAPI  # noqa: PLC0415

    options = service.options
    blocks = gradio.Blocks(title=f"{Path(options.run).name} · hpcmm", analytics_enabled=False)
    with blocks:
        page.build(service, cache)
    blocks.queue(max_size=4 * options.max_waiting + 64, default_concurrency_limit=None, api_open=False)
    blocks._queue.sleep_when_free = _IDLE_S
    blocks.state_session_capacity = _SESSIONS
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        server_name=LOOPBACK,
        server_port=address.port,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=options.max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=_theme(gradio.themes),
        css=CSS.read_text(encoding="utf-8") + page.css,
    )
    return Guard(
        app,
        token=address.token,
        cookie=f"hpcmm_serve_{address.port}",
        cache=cache,
        max_body_bytes=options.max_body_bytes,
        functions=frozenset(blocks.fns),
    )


def _theme(themes: Any) -> Any:
    """gradio's plain theme with the viewer's own fonts: none is fetched."""
    plain = themes.Default(font=_FONTS, font_mono=_MONO, primary_hue="blue", neutral_hue="slate")
    # Labels are words above a field, not coloured boxes over a picture.
    quiet = {"block_title_background_fill": "transparent", "block_label_background_fill": "transparent"}
    return plain.set(**quiet, **{f"{name}_dark": value for name, value in quiet.items()})


class Connection(H11Protocol):
    """uvicorn's connection, closed if it has not brought the token within ``_PROOF_S``.

    Anybody on this machine can connect. So of too many that have not brought it, the oldest one is closed of the user
    who has most of them: who floods the server closes their own.
    """

    uid: int | None = None
    since_s = 0.0
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_unproved(self) -> bool:
        """Whether it has still to bring the token, and is not closed yet."""
        return self._timer is not None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.uid = peer_uid(transport.get_extra_info("socket"))
        self.since_s = self.loop.time()
        self.app_state = {**self.app_state, PROVED: self.forget}
        self._timer = self.loop.call_later(_PROOF_S, self.refuse)
        unproved = [each for each in self.connections if isinstance(each, Connection) and each.is_unproved]
        if len(unproved) > _MOST_UNPROVED:
            [(most, _)] = Counter(each.uid for each in unproved).most_common(1)
            min((each for each in unproved if each.uid == most), key=lambda each: each.since_s).refuse()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        super().connection_lost(exc)

    def forget(self) -> None:
        """It needs to prove nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def refuse(self) -> None:
        """Close it at once."""
        self.forget()
        self.transport.abort()


def _run(app: Any, held: socket.socket, cache: Path, ready: Callable[[], None], ends: Callable[[], bool]) -> None:
    """Answer requests in a thread of their own, and watch over it here until it is to end."""
    import uvicorn  # noqa: PLC0415

    # No log of accesses: addresses hold the token. Nor of warnings: anybody without the token could fill the disk.
    settings = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=30,
        limit_concurrency=_CONNECTIONS,
        backlog=_ACCEPTED_AT_ONCE,
        h11_max_incomplete_event_size=HEAD_LIMIT_BYTES,
        http=Connection,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, name="http", daemon=True)
    with _told_to_end() as told:
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        if not thread.is_alive():
            raise HpcmmError("The server could not start: see the lines above.")
        ready()
        swept_s = time.monotonic()
        keep = set(cache.rglob("*"))
        while thread.is_alive() and not told.wait(0.3) and not ends():
            if time.monotonic() - swept_s > _SWEEP_S:
                _sweep(cache, keep)
                swept_s = time.monotonic()
        # Pages that are still open are cut off, each of which uvicorn would report with a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True
        thread.join(timeout=4 * _GRACE_S)


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM, Ctrl-C and a closed terminal set, as long as this is entered."""
    told = threading.Event()
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        numbers.append(signal.SIGHUP)

    def tell(_number: int, _frame: FrameType | None) -> None:
        told.set()

    before = {number: signal.signal(number, tell) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    """A socket of this machine's loopback interface; no other machine reaches it."""
    try:
        held = hold_free_port(LOOPBACK) if port == 0 else _bound(port)
        held.listen()  # two may be bound to a port, but only one can listen: no other user takes it while we load
    except OSError as error:
        raise HpcmmError(f"Port {port} cannot be had ({error.strerror}): choose another, or --port 0.") from error
    with held:
        yield held


def _bound(port: int) -> socket.socket:
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((LOOPBACK, port))
    except OSError:
        held.close()
        raise
    return held


def _settle_gradio(cache: Path) -> None:
    """Before gradio is imported: it fetches and reports nothing, and keeps its files in ``cache``."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(cache),
        GRADIO_EXAMPLES_CACHE=str(cache / "examples"),
        GRADIO_SHARE="False",
        GRADIO_MCP_SERVER="False",
        GRADIO_RUN_HISTORY="False",
        GRADIO_ALLOWED_PATHS="",
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
    )


def _sweep(cache: Path, keep: set[Path]) -> None:
    """Delete uploads that are older than a quarter of an hour; ``keep`` was there from the start."""
    oldest_s = time.time() - _KEPT_S
    for path in cache.rglob("*"):
        try:
            if path not in keep and path.is_file() and path.stat().st_mtime < oldest_s:
                path.unlink()
                path.parent.rmdir()  # succeeds for the last of a folder
        except OSError:
            continue
