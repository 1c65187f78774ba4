"""What an answer may say next: grammars, tool calls and closed thoughts as masks over tokens.

Grammars are llguidance's. A `Guide` follows one answer token by token on the host. It tells the
parts of an answer apart itself (thought, content, tool call), so that a grammar is asked only
inside the part that it describes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from qwen3vl_mlx.engine.grammar import Grammar, parse_grammar, shortened
from qwen3vl_mlx.engine.grammar_compiler import BLANK_LINE, Bits, GrammarCompiler, expand
from qwen3vl_mlx.engine.output import TOOL_END, TOOL_START
from qwen3vl_mlx.engine.thinking import Thought, spelled

if TYPE_CHECKING:
    import llguidance

__all__ = ["Grammar", "GrammarCompiler", "Guide", "expand", "make_guide", "parse_grammar"]

# Where an answer is. start: nothing said yet, content: inside its grammar, text: free until a call
# starts, between: around calls, end: only an end token may follow, free: nothing is asked.
Part: TypeAlias = Literal[
    "thought", "start", "content", "text", "call", "between", "end", "free", "done"
]


def make_guide(
    compiler: GrammarCompiler,
    grammar: Grammar | None,
    *,
    thinking: bool,
    thinking_budget: int | None = None,
    end_tokens: frozenset[int] | None = None,
) -> Guide | None:
    """A guide for one answer, or None where nothing is asked of it.

    thinking: the prompt has opened a thought, so the grammar waits for its end; `thinking_budget`
    tokens are thought at most (the tokens that close the thought come on top). end_tokens: those
    of the compiler's that end this answer; None for all. With none of them, free text goes on for
    ever, and a grammar for as long as it can. InputError where the grammar cannot be used, as from
    `GrammarCompiler.compile`.
    """
    waits = thinking and (grammar is not None or thinking_budget is not None)
    thought = Thought.begin(compiler.tokenizer, thinking_budget) if waits else None
    if grammar is None and thought is None:
        return None
    ends = frozenset(compiler.eos_token_ids) if end_tokens is None else end_tokens
    return Guide(compiler, grammar or Grammar(), thought, ends)


class Guide:
    """What one answer may say next. Fed every token of it, in order; lives on the host.

    `failure` says why the answer cannot be what was asked; None while it can.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        grammar: Grammar,
        thought: Thought | None,
        end_tokens: frozenset[int],
    ):
        compiler.compile(grammar)
        self.compiler = compiler
        self.grammar = grammar
        self.failure: str | None = None
        self.part: Part = "thought"
        self._thought = thought
        self._end_tokens = end_tokens
        self._end_bits = compiler.only(*end_tokens)
        self._matcher: llguidance.LLMatcher | None = None
        self._progress = 0  # bytes of the next tag that were spelled by text tokens
        self._newlines = 0  # that may still come before this part
        self._calls = 0
        self._mask: tuple[Bits | None] | None = None  # of this state, once it is known
        if thought is None:
            self._open()

    def fork(self) -> Guide:
        """Another guide in the same state."""
        other = copy.copy(self)
        if self._matcher is not None:
            other._matcher = self._matcher.deep_copy()
        return other

    @property
    def wants_host(self) -> bool:
        """Whether the mask depends on tokens still to come; False: it stays as it is for good."""
        return self.part not in ("free", "end", "done") and self.failure is None

    @property
    def complete(self) -> bool:
        """Whether the answer is as asked and only an end token may follow."""
        if self.part in ("start", "content") and self._matcher is not None:
            return self._matcher.is_stopped() and self._matcher.is_accepting()
        return self.failure is None and self.part in ("end", "done")

    def mask(self) -> Bits | None:
        """(W,) bits of the tokens that may come next; None where all may. Do not change it.

        After a failure only end tokens may.
        """
        if self._mask is None:
            self._mask = (self._new_mask(),)
            if self._mask[0] is not None and not self._mask[0].any():
                self._fail("no token can follow what was said")
        return self._mask[0] if self.failure is None else self.compiler.end_bits

    def masks(self, tokens: Sequence[int]) -> list[Bits | None]:
        """Masks before each of `tokens` and after the last; the state stays. For speculation."""
        branch, found = self.fork(), [self.mask()]
        for token in tokens:
            branch.consume(token)
            found.append(branch.mask())
        return found

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, in order, the masks allow; the state stays."""
        branch = self.fork()
        for count, token in enumerate(tokens):
            if branch.part == "done" or not branch._allows(token):
                return count
            branch.consume(token)
        return len(tokens)

    def consume(self, token: int) -> None:
        """Note a token of the answer. One that was not allowed sets `failure`."""
        if self.failure is not None or self.part == "done":
            return
        if self._ends_with(token):
            self._end(token)
        elif self.part == "thought":
            self._think(token)
        elif 0 < (count := self.compiler.newline_tokens.get(token, 0)) <= self._newlines:
            self._newlines -= count
        else:
            self._newlines = 0
            self._say(token)
        self._mask = None

    # What may come next.

    def _new_mask(self) -> Bits | None:
        compiler, tools = self.compiler, self.grammar.tools
        if self.part in ("end", "done") or self.failure is not None:
            return compiler.end_bits
        if self.part == "thought":
            forced = self._thought.forced if self._thought is not None else ()
            if forced:
                return compiler.only(forced[0])
            return compiler.all_but_end if self._owes_answer else None
        if self.part == "free":
            return compiler.all_but_call if self.grammar.no_calls else None
        if self.part == "text":
            banned = self._spelling(TOOL_START)
            return ~banned if banned.any() else None
        bits = self._matched() if self.part != "between" else compiler.none()
        if self.part == "between" and not self._owes_call:
            bits |= self._end_bits
        if self.part in ("start", "between"):
            if tools is not None:
                bits |= compiler.only(compiler.tool_start)
            lines = [t for t, n in compiler.newline_tokens.items() if n <= self._newlines]
            bits |= compiler.only(*lines)
        return bits

    def _allows(self, token: int) -> bool:
        bits = self.mask()
        return bits is None or bool(int(bits[token // 32]) >> (token % 32) & 1)

    def _ends_with(self, token: int) -> bool:
        """Whether the answer is over with this token, be it whole or not.

        Where text is free, end tokens that do not count are tokens like any other; elsewhere
        nothing can be said with them.
        """
        free = self.part in ("text", "free") or (self.part == "thought" and not self._owes_answer)
        return token in (self._end_tokens if free else self.compiler.eos_token_ids)

    @property
    def _owes_answer(self) -> bool:
        """Whether something must follow the thought."""
        return self.grammar.content is not None or self._owes_call

    @property
    def _owes_call(self) -> bool:
        tools = self.grammar.tools
        return tools is not None and tools.required and self._calls == 0

    def _matched(self) -> Bits:
        """What the grammar allows; where the text of a call may end, the closing tag."""
        compiler, matcher = self.compiler, self._matcher
        assert matcher is not None
        bits = compiler.allowed_by(matcher)
        if matcher.is_error():
            self._fail(shortened(matcher.get_error()))
            return bits
        if self.part == "call":
            if (bits & compiler.end_bits).any():
                bits = (bits & ~compiler.end_bits) | compiler.only(compiler.tool_end)
            return bits & ~self._spelling(TOOL_END)
        if self.grammar.tools is not None:
            bits &= ~self._spelling(TOOL_START)
        going_on = bits & compiler.all_but_end
        # Where nothing else can follow, an end token is let through, whether it counts or not.
        return bits & (going_on | self._end_bits) if going_on.any() else bits

    def _spelling(self, tag: str) -> Bits:
        """Text tokens that would complete the tag, which whoever reads the answer would obey."""
        return self.compiler.completing(tag, self._progress)

    # What a token changes.

    def _think(self, token: int) -> None:
        compiler, thought = self.compiler, self._thought
        assert thought is not None
        forced = thought.forced
        if forced and token != forced[0]:
            self._fail("the thought's budget was spent, and it was not closed")
        else:
            self._thought, after = thought.push(token, compiler.shown_text_of(token))
            if after is not None:
                self._open()
                lines = len(after) - len(after.lstrip(b"\n"))
                self._newlines = 0 if forced else max(0, BLANK_LINE - lines)
                self._say_text(after[lines:])

    def _open(self) -> None:
        """Begin what follows the thought."""
        tools, content = self.grammar.tools, self.grammar.content
        if tools is not None and tools.required:
            self.part = "between"
        elif content is not None:
            self._matcher = self.compiler.matcher(content)
            self.part = "start"
        else:
            self.part = "text" if tools is not None else "free"

    def _end(self, token: int) -> None:
        if not self._allows(token):
            inside = self.part == "thought"
            place = "inside its thought" if inside else "before it was whole"
            self._fail(f"the answer ended {place}")
        self.part = "done"

    def _say_text(self, text: bytes) -> None:
        """Note text that came in one token with the end of the thought."""
        if text and self.part != "free":
            self._newlines = 0
            for token in self.compiler.tokens_of(text):
                self._say(token)

    def _say(self, token: int) -> None:
        tools, compiler = self.grammar.tools, self.compiler
        if self.part in ("start", "text", "between") and token == compiler.tool_start and tools:
            self._matcher = compiler.matcher(tools.body)
            self._progress = 0
            self.part = "call"
        elif self.part == "call" and token == compiler.tool_end:
            self._close_call()
        elif self.part in ("start", "content"):
            self.part = "content"
            self._match(token)
            if tools is not None:
                self._follow(token, TOOL_START)
        elif self.part == "call":
            self._match(token)
            self._follow(token, TOOL_END)
        elif self.part == "text":
            self._follow(token, TOOL_START)
        elif self.part != "free":
            self._fail(f"{self._shown(token)} cannot come beside the tool calls asked for")

    def _match(self, token: int) -> None:
        assert self._matcher is not None
        if not self._matcher.consume_token(token):
            reason = shortened(self._matcher.get_error())
            self._fail(f"{self._shown(token)} breaks the grammar: {reason}")

    def _follow(self, token: int, tag: str) -> None:
        """Keep count of how much of a tag text tokens have spelled."""
        text = self.compiler.shown_text_of(token)
        if text and token in self.compiler.added_ids:
            self._progress = 0
            return
        self._progress, after = spelled(tag.encode(), self._progress, text)
        if after is not None:
            self._fail(f"{tag} was spelled out as text")

    def _close_call(self) -> None:
        tools, matcher = self.grammar.tools, self._matcher
        assert tools is not None
        assert matcher is not None
        if not matcher.is_accepting():
            self._fail("a tool call ended before it was whole")
        self._calls += 1
        self._progress = 0
        if tools.single:
            self.part = "end"
        elif tools.required or self.grammar.content is not None:
            self.part, self._newlines = "between", 1
        else:
            self.part = "text"

    def _shown(self, token: int) -> str:
        return repr(self.compiler.text_of(token).decode("utf-8", "replace"))

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
