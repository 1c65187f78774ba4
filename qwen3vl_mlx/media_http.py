"""Download a small file over HTTP(S) with the standard library, bounded in time, size and place."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request

from qwen3vl_mlx import __version__
from qwen3vl_mlx.errors import ImageError

_CHUNK = 2**16


class _FewRedirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows http and https alone: no redirect can reach a file or an FTP server."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _FewRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def fetch(url: str, name: str, *, timeout: float, max_bytes: int) -> bytes:
    """Return the body at `url`; `name` stands for it in messages.

    `timeout` (seconds) holds for each step of the connection and for the body as a whole.

    Raises:
        ImageError: a bad URL, no connection, an HTTP error, too slow, or over `max_bytes`.
    """
    try:
        request = urllib.request.Request(
            urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"),  # spaces and accents are common
            headers={"User-Agent": f"qwen3vl-mlx/{__version__}"},
        )
        deadline = time.monotonic() + timeout
        with _opener().open(request, timeout=timeout) as response:
            return _body(response, name, deadline, max_bytes)
    except ImageError:
        raise
    except urllib.error.HTTPError as err:
        err.close()
        if 300 <= err.code < 400:
            raise ImageError(
                f"{name} redirects too often or to something else than http(s); use the final URL"
            ) from err
        raise ImageError(
            f"{name} could not be fetched: HTTP {err.code} {err.reason}; check the URL, "
            "or download the file and pass its path"
        ) from err
    except (OSError, http.client.HTTPException) as err:
        reason = err.reason if isinstance(err, urllib.error.URLError) else err
        if isinstance(err, http.client.InvalidURL):
            raise ImageError(f"{name} is not a valid URL; expected http(s)://host/path") from err
        if isinstance(reason, TimeoutError):
            raise ImageError(
                f"{name} timed out after {timeout:g} s; try again, or download the file and "
                "pass its path"
            ) from err
        raise ImageError(
            f"{name} could not be fetched ({reason}); check the URL and the connection"
        ) from err
    except ValueError as err:
        raise ImageError(f"{name} is not a valid URL; expected http(s)://host/path") from err


def _body(response: http.client.HTTPResponse, name: str, deadline: float, max_bytes: int) -> bytes:
    """Read the body piece by piece: the announced length is a hint, `max_bytes` the law."""
    announced = response.headers.get("Content-Length", "")
    too_large = f"{name} is larger than the {max_bytes} bytes allowed; use a smaller file"
    if announced.isdecimal() and int(announced) > max_bytes:
        raise ImageError(too_large)
    body = bytearray()
    while piece := response.read1(_CHUNK):  # one receive each, so that a trickle meets the deadline
        body += piece
        if len(body) > max_bytes:
            raise ImageError(too_large)
        if time.monotonic() > deadline:
            raise TimeoutError
    if announced.isdecimal() and len(body) < int(announced):
        raise ImageError(
            f"{name}: the connection closed after {len(body)} of {announced} bytes; try again"
        )
    return bytes(body)
