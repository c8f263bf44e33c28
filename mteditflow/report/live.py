"""A page on this machine that shows a run while it goes on: `mteditflow report RUN --live`.

It is made anew from the run's folder whenever a browser asks, and has the browser ask again as long as the run is not
finished: no script. The whole report is one link away. Only names of this machine are answered to, so that no page from
elsewhere can read it; look at a run on another machine through `ssh -L PORT:localhost:PORT`.
"""

import errno
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from mteditflow.config.ranges import require
from mteditflow.record.metrics import FILE, read_lines
from mteditflow.record.templates import fill_in
from mteditflow.report.run_report import (
    HELD_OUT,
    REWARD,
    alarm_rows,
    is_stopped,
    lay_out,
    progress,
    read_config,
    read_strips,
    report_contents,
)

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]")
REFRESH_S = 10
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def live_contents(folder: Path) -> dict[str, Any]:
    """Gather the template's variables from what the run has written so far, which may be nothing."""
    lines = read_lines(folder / FILE) if (folder / FILE).is_file() else []
    config, _ = read_config(folder / "config.yaml")
    total = config.run.num_iterations if config else 0
    is_finished = (folder / "comparison.json").is_file() and (len(lines) >= total or is_stopped(lines, config))
    strips, watched = read_strips(folder, None), alarm_rows(lines, config)
    newest = list(strips.items())[-1:]
    return {
        "title": f"MT-EditFlow: {config.run.folder if config else folder.resolve().name}",
        "refresh": 0 if is_finished else REFRESH_S,
        "state": "Finished." if is_finished else _state(folder),
        "share": 100 * min(len(lines) / total, 1.0) if total else 0.0,
        "progress": progress(lines, config) if lines else "No iteration is done yet.",
        "charts": [item for item in (lay_out(HELD_OUT, lines), lay_out(REWARD, lines)) if item],
        "strips": dict(newest),
        "alarms": [row for row in watched if row["first"]],
        "num_watched": len(watched),
    }


def _state(folder: Path) -> str:
    """Say whether a process of this machine is at work in the folder, and at what evaluation."""
    path = folder / "lock"
    number = path.read_text().strip() if path.is_file() else ""
    if not (number.isdecimal() and psutil.pid_exists(int(number))):
        return "No process of this machine is at work here: the run was stopped, or is on another machine."
    for name, what in (("before", "the base"), ("after", "what was trained")):
        parts = len(list((folder / f"evaluating_{name}").glob("part-*")))
        if parts:
            return f"At work: process {number}, which evaluates {what}; parts that are there: {parts}."
    return f"At work: process {number}."


def answer(folder: Path, path: str, host: str) -> tuple[HTTPStatus, str]:
    """Give status and page of a request for a path, by the name of the host that it asks."""
    if host.rsplit(":", 1)[0] not in NAMES:
        return HTTPStatus.FORBIDDEN, f"ask for http://{HOST}"
    if path == "/":
        return HTTPStatus.OK, fill_in("report/live.html.jinja", live_contents(folder))
    if path == "/report" and (folder / FILE).is_file():
        return HTTPStatus.OK, fill_in("report/report.html.jinja", report_contents(folder))
    return HTTPStatus.NOT_FOUND, "there is / and, once the run has begun, /report"


class _Handler(BaseHTTPRequestHandler):
    """The standard library's, which is told by a class what to answer."""

    def __init__(self, folder: Path, *others: Any) -> None:
        self.folder = folder
        super().__init__(*others)

    def do_GET(self) -> None:
        try:
            status, page = answer(self.folder, self.path, self.headers.get("Host", ""))
        except ValueError as error:  # a file of the run that is damaged, or half written by another program
            status, page = HTTPStatus.INTERNAL_SERVER_ERROR, str(error)
        content = page.encode()
        self.send_response(status)
        kind = "text/html" if status == HTTPStatus.OK else "text/plain"
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a browser asks every few seconds."""


def open_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Listen on this machine alone; port 0: any that is free. ValueError: no run there, or the port cannot be had."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the run.folder of a training")
    is_run = any((folder / name).exists() for name in (FILE, "config.yaml", "lock"))
    if not is_run:
        raise ValueError(f"{folder} is not the folder of a run: it has no {FILE}")
    require(0 <= port <= 65535, "--port", port, "must lie in [0, 65535]")
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, folder))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(f"--port is {port}: it cannot be had ({error.strerror}); take another, or 0") from None


def serve(folder: Path, port: int) -> None:
    """Show a run until the user stops it."""
    with open_server(folder, port) as server:
        print(f"live: http://{HOST}:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
