"""Fetch files over HTTP with several threads: a file is complete and checked, or it is not there."""

import hashlib
import http.client
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from oracle.corpus import DataError

ATTEMPTS = 6  # with pauses of 1, 2, 4, 8 and 16 s between them
_CHUNK = 1 << 20
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that a later attempt may not see


def download(
    base_url: str,
    names: Iterable[str],
    folder: Path,
    *,
    workers: int = 8,
    timeout_s: float = 30.0,
    pause_s: float = 1.0,
    received: Callable[[str, int], None] = lambda name, size: None,
) -> None:
    """Fetch `base_url` + each name into `folder`; files already there are complete and are skipped.

    A failed attempt is repeated after `pause_s`, doubled each time. `received(name, bytes)` hears of every
    finished file. Raises DataError for the first file that cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name).is_file()]
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in missing:
        waiting.put(name)
    outcomes: queue.SimpleQueue[tuple[str, int | BaseException]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcome: int | BaseException = _fetch(base_url + name, folder / name, timeout_s, pause_s, stopped)
            except BaseException as error:
                outcome = error
            outcomes.put((name, outcome))

    # Daemons: Ctrl-C must not wait for a server that stalls
    threads = [threading.Thread(target=work, name="download", daemon=True) for _ in missing[:workers]]
    for thread in threads:
        thread.start()
    try:
        for _ in missing:
            name, outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            received(name, outcome)
    except DataError:
        stopped.set()
        for thread in threads:
            thread.join()
        raise
    finally:
        stopped.set()


def _fetch(url: str, path: Path, timeout_s: float, pause_s: float, stopped: threading.Event) -> int:
    for attempt in range(ATTEMPTS):
        try:
            return _attempt(url, path, timeout_s, stopped)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _PASSING:
                raise DataError(f"{url} cannot be fetched: the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except (http.client.HTTPException, TimeoutError, ConnectionError, urllib.error.URLError, _Broken) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if attempt + 1 < ATTEMPTS and stopped.wait(pause_s * 2**attempt):
            break
    raise DataError(f"{url} cannot be fetched after {ATTEMPTS} attempts ({reason}): run the same command to go on")


class _Broken(Exception):
    """A transfer that ended early or does not match its digest."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the digest that a hub sends with the redirect to its storage."""

    digest: str | None = None

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        self.digest = self.digest or _digest(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _attempt(url: str, path: Path, timeout_s: float, stopped: threading.Event) -> int:
    redirects = _Redirects()
    staged = path.with_name(path.name + ".tmp")
    size = 0
    digest = hashlib.sha256()
    with urllib.request.build_opener(redirects).open(url, timeout=timeout_s) as answer, staged.open("wb") as file:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if stopped.is_set():
                raise _Broken("another file failed")
        announced = answer.headers["Content-Length"]
        expected = redirects.digest or _digest(answer.headers)
    if announced is not None and size != int(announced):
        raise _Broken(f"{size} of {announced} bytes arrived")
    if expected is not None and digest.hexdigest() != expected:
        raise _Broken(f"its sha256 is {digest.hexdigest()}, not {expected}")
    os.replace(staged, path)
    return size


def _digest(headers: http.client.HTTPMessage) -> str | None:
    tag = (headers["X-Linked-Etag"] or headers["ETag"] or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None
