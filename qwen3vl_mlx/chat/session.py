"""A conversation with its model, settings, waiting pictures and counts. Knows no terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_mlx.chat import settings, store
from qwen3vl_mlx.chat.loader import Loader, ModelChoice
from qwen3vl_mlx.chat.pictures import Attached, Picture
from qwen3vl_mlx.chat.transcript import Transcript, Turn
from qwen3vl_mlx.errors import InputError, OutputError
from qwen3vl_mlx.question_options import default_prompt

if TYPE_CHECKING:
    from qwen3vl_mlx.api import Qwen3VL
    from qwen3vl_mlx.conversation import Chat
    from qwen3vl_mlx.engine.output import Chunk, Usage
    from qwen3vl_mlx.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Asked:
    """A question of the conversation; its answer is in the chat's messages."""

    question: str
    pictures: tuple[Picture, ...]


@dataclass
class Totals:
    """Sums over the answers since the program began."""

    answers: int = 0
    stopped: int = 0  # by the person, before their end
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_sec: float = 0.0
    completion_sec: float = 0.0

    def add(self, usage: Usage) -> None:
        """Count one finished answer."""
        self.answers += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.prompt_sec += usage.total_prompt_time_sec
        self.completion_sec += usage.total_completion_time_sec


@dataclass(frozen=True)
class Saved:
    """What `save` wrote."""

    folder: Path
    nbytes: int
    tokens: int  # of the cache
    problem: str | None = None  # why there is no cache


class Session:
    """What the commands and the questions work on."""

    def __init__(
        self,
        loader: Loader,
        changes: Mapping[str, Any],
        system: str | None,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        self.loader = loader
        self.meanwhile = meanwhile  # called while the model is waited for
        self.choice = loader.choice
        self.changes = dict(changes)
        self.waiting: list[Attached] = []  # pictures for the next question
        self.asked: list[Asked] = []
        self.usage: Usage | None = None  # of the last answer
        self.totals = Totals()
        self.saved_at: Path | None = None  # where this conversation may be saved again
        self._system = system
        self._chat: Chat | None = None
        self._kept: Transcript | None = None  # what the model that is being loaded goes on from
        self._retries = 0

    @property
    def chat(self) -> Chat:
        """The library's conversation. Waits for the model."""
        if self._chat is None:
            chat = self._begin(self.loader.result(self.meanwhile), self._system)
            if self._kept is not None:
                chat.restore(self._kept.messages())
                if self.saved_at is not None:
                    read_prefix(chat, self.saved_at)
            self._chat, self._kept = chat, None
        return self._chat

    @property
    def model(self) -> Qwen3VL:
        """The loaded model. Waits for it."""
        return self.chat.model

    @property
    def params(self) -> SamplingParams:
        """How the next answer is sampled."""
        from qwen3vl_mlx.engine.sampling import asked_params

        changes = settings.sampling_of(self.changes)
        return asked_params(self.model.default_params, changes, {})

    def _begin(self, model: Qwen3VL, system: str | None) -> Chat:
        chat = model.chat(system, **settings.pixels_of(self.changes))
        chat.number_images = self.changes.get("number_images", False)
        return chat

    # Asking.

    def ask(self, text: str, named: Sequence[Attached] = ()) -> Iterator[Chunk]:
        """Ask about the waiting pictures and those named, in this order.

        The turn is kept, and the waiting pictures are used up, once the model has said something.
        Raises InputError for what cannot be asked.
        """
        attached = [*self.waiting, *named]
        if not text:
            text = default_prompt(len(attached))
        self.chat.params = self.params
        chunks = self.chat.stream(text, images=[each.image for each in attached])
        turn = Asked(text, tuple(each.picture for each in attached))
        return self._followed(chunks, turn)

    def retry(self) -> Iterator[Chunk]:
        """Ask the last question again. A seed that was set gives way to the one after it."""
        params = self.params
        if params.seed is not None:
            self._retries += 1
            params = replace(params, seed=(params.seed + self._retries) % 2**64)
        self.chat.params = params
        return self._followed(self.chat.retry(), None)

    def _followed(
        self, chunks: Generator[Chunk, None, None], turn: Asked | None
    ) -> Iterator[Chunk]:
        before = len(self.chat.messages)
        ended = False
        try:
            with closing(chunks):
                for chunk in chunks:
                    if chunk.usage is not None:
                        ended = True
                        self.usage = chunk.usage
                        self.totals.add(chunk.usage)
                    yield chunk
        finally:
            self.totals.stopped += not ended
            if turn is not None and len(self.chat.messages) > before:
                self.asked.append(turn)
                self.waiting.clear()
                self._retries = 0

    @property
    def visual_tokens(self) -> int:
        """Of the pictures of the last question."""
        messages = self.chat.messages
        if len(messages) < 2 or isinstance(messages[-2]["content"], str):
            return 0
        parts = [part for part in messages[-2]["content"] if part["type"] == "image"]
        return sum(part["image"].num_tokens for part in parts)

    def rest(self) -> None:
        """Wait until the model does nothing: an answer that was stopped ends at its next step."""
        if self._chat is not None:
            self.model.engine.call(lambda: None)

    # Changing.

    def change(self, name: str, value: Any) -> None:
        """Set one setting; None is the default again. Raises InputError, changing nothing."""
        changes = {**self.changes, name: value}
        if value is None:
            del changes[name]
        settings.check(changes)
        pixels = settings.pixels_of(changes)
        if self._chat is not None:
            if name == "logit_bias" and value:
                replace(self.params, logit_bias=value).check_vocabulary(
                    self.model.asking.vocab_size
                )
            self._chat.budget = self.model.processor.image_budget(**pixels)
            self._chat.number_images = changes.get("number_images", False)
        self.changes = changes
        self._retries = 0

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        if self._kept is not None:
            self._kept = replace(self._kept, system=text)
        if self._chat is not None:
            self._chat.system = text

    def clear(self) -> None:
        """Forget all turns and waiting pictures; system message and settings stay."""
        self.asked.clear()
        self.waiting.clear()
        self.usage = self.saved_at = self._kept = None
        if self._chat is not None:
            self._chat = self._begin(self.model, self._system)

    # Models.

    def switch(self, choice: ModelChoice) -> None:
        """Go on with another model. Where that fails the old one is loaded again meanwhile.

        The old one is let go first: two may be more than the machine holds. Raises what `load`
        raises.
        """
        choice.fetch()  # a wrong name, or no network, leaves all as it is
        kept, old = self.transcript(), self.choice
        try:
            self.model.close()
            self._chat = None
            self.loader.forget()
            chat = self._begin(choice.load(progress=True), None)
            chat.restore(kept.messages())
        except BaseException:
            self._chat, self._kept = None, kept
            self.loader = Loader(old)
            raise
        self._chat, self.choice = chat, choice

    # Keeping.

    def transcript(self) -> Transcript:
        """The conversation as it stands."""
        if self._kept is not None:  # the model has not come yet
            return replace(self._kept, model=self.choice.absolute, changes=dict(self.changes))
        turns: list[Turn] = []
        if self.asked:
            messages = self.chat.messages[self._system is not None :]
            answers = messages[1::2]
            turns = [
                Turn(
                    asked.question,
                    asked.pictures,
                    answer["content"],
                    answer.get("reasoning_content", ""),
                )
                for asked, answer in zip(self.asked, answers, strict=True)
            ]
        return Transcript(self.choice.absolute, self._system, tuple(turns), dict(self.changes))

    def save(self, folder: Path, *, cache: bool, force: bool) -> Saved:
        """Write the conversation, and what the model remembers of it.

        force replaces another conversation that is there. Raises InputError or OutputError.
        """
        if store.is_saved(folder) and folder != self.saved_at and not force:
            raise InputError(f"{folder} is there already: /save -f NAME replaces it")
        store.write_conversation(folder, self.transcript())
        self.saved_at = folder
        tokens, problem = 0, None
        if cache and self.asked:
            from qwen3vl_mlx.chat.prefixes import write_prefix

            try:
                tokens = write_prefix(self.chat, folder)
            except OutputError as error:
                problem = str(error)
        return Saved(folder, store.folder_bytes(folder), tokens, problem)

    def resume(self, transcript: Transcript, folder: Path) -> None:
        """Begin with a saved conversation, which is given to the model when it is there.

        Settings and system message of the session's own go before those that were saved.
        """
        self.changes = {**transcript.changes, **self.changes}
        self._system = transcript.system if self._system is None else self._system
        self._kept = replace(transcript, system=self._system)
        self._note_turns(transcript, folder)

    def _note_turns(self, transcript: Transcript, folder: Path) -> None:
        self.asked = [Asked(turn.question, turn.pictures) for turn in transcript.turns]
        self.usage, self.saved_at = None, folder

    def restore(self, transcript: Transcript, folder: Path) -> int:
        """Go on with a saved conversation; returns the tokens its cache saves.

        Raises InputError, and the conversation of before goes on, where it does not fit.
        """
        before = self.changes
        try:
            self.changes = dict(transcript.changes)
            chat = self._begin(self.model, None)
            chat.restore(transcript.messages())
        except InputError:
            self.changes = before
            raise
        self._chat, self._system = chat, transcript.system
        self.waiting.clear()
        self._note_turns(transcript, folder)
        return read_prefix(chat, folder)


def read_prefix(chat: Chat, folder: Path) -> int:
    """See `prefixes.read_prefix`, which needs MLX."""
    from qwen3vl_mlx.chat import prefixes

    return prefixes.read_prefix(chat, folder)
