"""A chat server that says what it is told to: `python scripted_server.py MODE [...] --port N`.

What it streams is chosen by the text of the question, else "So it is." about any picture. Modes:
good; mixes: other text while another request is open; fails: an error event then; forgets: its
requests never end in /metrics; dies: at once; stays: SIGTERM does not end it.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOADING = 1  # request that is too early


def piece(content: str | None, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'
END = (piece(None, "stop"), USAGE, DONE)
ERROR = b'data: {"error": {"message": "it broke"}}\n\n'
SAID: dict[str, tuple[bytes, ...]] = {
    "commented": (b": keep-alive\n\n", piece("So"), b": keep-alive\n\n", piece(" it is."), *END),
    "broken": (piece("So"), ERROR),
    "cut": (piece("So"),),
    "open": (piece("So"), DONE),
    "damaged": (b"data: {\n\n", DONE),
    "": (piece("So"), piece(" it"), piece(" is"), piece("."), *END),
}
MIXED = (piece("That"), piece(" was another"), piece(" question."), *END)


class Handler(BaseHTTPRequestHandler):
    mode = "good"
    asked = 0
    now = 0

    def do_GET(self) -> None:
        waiting = Handler.mode == "forgets"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            b"# HELP of no interest\nqwen3vl_memory_active_bytes 1e6\n"
            b'qwen3vl_model_state{state="ready"} 1\nqwen3vl_memory_cache_bytes 2e6\n'
            b"qwen3vl_requests_prefilling 0\nqwen3vl_requests_running 0\n"
            b"qwen3vl_requests_waiting %d\n" % waiting
        )

    def do_POST(self) -> None:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][1]["text"]
        Handler.asked += 1
        if Handler.asked <= LOADING or text == "refused":
            self.send_error(503)
            return
        Handler.now += 1
        said = SAID.get(text, SAID[""])
        try:
            self.send_response(200)
            self.end_headers()
            for i, line in enumerate(said):
                time.sleep(0.01)
                if i == 1 and Handler.now > 1 and Handler.mode in ("mixes", "fails"):
                    self.wfile.write(MIXED[1] if Handler.mode == "mixes" else ERROR)
                    continue
                self.wfile.write(line)
        except OSError:
            pass  # the client has left
        finally:
            Handler.now -= 1

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    Handler.mode = sys.argv[1]
    if Handler.mode == "dies":
        sys.exit("no room for the model")
    stays = Handler.mode == "stays"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stays else lambda *_: sys.exit(0))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
