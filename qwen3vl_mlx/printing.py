"""A streamed answer in a terminal or a pipe: the text on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen3vl_mlx.errors import Qwen3VLError

if TYPE_CHECKING:
    from qwen3vl_mlx.engine.output import Chunk, Usage

_NOTES = {
    "timeout": "the answer was cut off by --timeout",
    "repetition": "the answer was cut off because it repeated itself",
    "constraint": "the answer ended where it could not follow the grammar any more",
}


class Printer:
    """Writes chunks as they come: answer to stdout; reasoning, notes and numbers to stderr.

    reading: names of pictures, shown on a terminal until the first chunk. quiet: no notes.
    """

    def __init__(
        self, reading: Sequence[str], *, as_json: bool, verbose: bool, quiet: bool = False
    ):
        self.json, self.verbose, self.quiet = as_json, verbose, quiet
        self.chunks: list[Chunk] = []
        self.waiting = sys.stderr.isatty() and not quiet
        self.ends_line = True
        if self.waiting:
            names = ", ".join(name[:40] for name in reading) or "the prompt"
            sys.stderr.write(f"Reading {names} ...")
            sys.stderr.flush()

    def erase_note(self) -> None:
        if self.waiting:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self.waiting = False

    def check_whole(self) -> None:
        """Raise Qwen3VLError where an answer that was to have a form ended before its end."""
        reason = self.chunks[-1].finish_reason if self.chunks else None
        if reason not in (None, "stop", "tool_calls", "cancelled"):
            raise Qwen3VLError(
                f"the answer has not the form that was asked for: it was cut off ({reason}); raise "
                "--max-tokens, or ask for less (with a JSON schema, set additionalProperties to "
                "false)"
            )

    def note(self, text: str) -> None:
        self.erase_note()
        if not self.quiet:
            print(f"note: {text}", file=sys.stderr)

    def show(self, chunk: Chunk) -> None:
        self.erase_note()
        self.chunks.append(chunk)
        if chunk.reasoning and self.verbose:
            sys.stderr.write(chunk.reasoning)
            sys.stderr.flush()
        if chunk.text and not self.json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            self.ends_line = chunk.text.endswith("\n")
        if chunk.finish_reason:
            self._end(chunk)

    def _end(self, last: Chunk) -> None:
        from qwen3vl_mlx.engine.output import collect

        completion = collect(self.chunks)
        if self.json:
            print(json.dumps(completion.to_dict(), ensure_ascii=False))
        elif not self.ends_line:
            print(flush=True)
        if not last.reasoning_closed:
            self.note(
                "the answer ended before the model had finished thinking "
                f"({last.finish_reason}); raise --max-tokens"
            )
        if last.finish_reason in _NOTES:
            self.note(_NOTES[last.finish_reason])
        if self.verbose and last.usage is not None:
            print(f"\n{statistics(last.usage)}", file=sys.stderr)


def statistics(usage: Usage) -> str:
    """Three lines for people."""
    guessed = ""
    if usage.drafted_tokens:
        guessed = f", {usage.accepted_tokens} of {usage.drafted_tokens} guesses right"
    return (
        f"prompt:     {usage.prompt_tokens} tokens, first token after "
        f"{usage.time_to_first_token_sec:.2f} s, {usage.avg_prompt_tok_per_sec:.1f} tokens/s\n"
        f"generation: {usage.completion_tokens} tokens, "
        f"{usage.avg_compl_tok_per_sec:.1f} tokens/s{guessed}\n"
        f"memory:     {usage.peak_memory_bytes / 1e9:.3f} GB at peak"
    )
