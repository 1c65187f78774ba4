"""The bodies of Anthropic's Messages API, as far as a Qwen3-VL can do what they ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from qwen3vl_mlx.processing.processor import MaxPixels
from qwen3vl_mlx.server.fields import Fields, Many

_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
)


def _one_of(*types: str) -> Discriminator:
    """Tells the models of a union by their `type`; all others are `Other`, refused by name.

    Tags are capitalized, so that no error takes them for a field.
    """

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, Mapping) else "other"
        kind = types[0] if kind is None else kind
        return kind.title() if isinstance(kind, str) and kind in types else "Other"

    return Discriminator(tag)


def _as_blocks(content: Any) -> Any:
    """A plain string is one block of text."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class CacheControl(Fields):
    """Accepted: what was read is kept for the next request anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Other(Fields):
    """A block, source or tool of a type that this server does not know or cannot do."""

    type: str


class Base64Source(Fields):
    type: Literal["base64"]
    media_type: str = Field("image/png", pattern=r"^image/[\w.+-]+$")  # its bytes tell which
    data: str


class UrlSource(Fields):
    type: Literal["url"]
    url: str


class Transformations(Fields):
    oversized_image: Literal["downsize"] | None = None


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ImageBlock(Fields):
    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("Base64")]
        | Annotated[UrlSource, Tag("Url")]
        | Annotated[Other, Tag("Other")],
        _one_of("base64", "url"),
    ]
    cache_control: CacheControl | None = None
    transformations: Transformations | None = None


class ThinkingBlock(Fields):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class Caller(Fields):
    type: Literal["direct"]


class ToolUseBlock(Fields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Caller | None = None
    toolset_name: None = None


Seen: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("Text")]
    | Annotated[ImageBlock, Tag("Image")]
    | Annotated[Other, Tag("Other")],
    _one_of("text", "image"),
]


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        Many[Seen], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Seen])
    ] = Field(default_factory=list)
    is_error: bool = False
    cache_control: CacheControl | None = None
    toolset_name: None = None


Block: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("Text")]
    | Annotated[ImageBlock, Tag("Image")]
    | Annotated[ThinkingBlock, Tag("Thinking")]
    | Annotated[ToolUseBlock, Tag("Tool_Use")]
    | Annotated[ToolResultBlock, Tag("Tool_Result")]
    | Annotated[Other, Tag("Other")],
    _one_of("text", "image", "thinking", "tool_use", "tool_result"),
]


class Message(Fields):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Many[Block],
        Field(min_length=1),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block]),
    ]


class Tool(Fields):
    """A tool that the client runs. `strict` binds its arguments to the schema."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    input_examples: Many[dict[str, Any]] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    allowed_callers: Many[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    eager_input_streaming: bool | None = None


AnyTool: TypeAlias = Annotated[
    Annotated[Tool, Tag("Custom")] | Annotated[Other, Tag("Other")], _one_of("custom")
]


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(Fields):
    """`adaptive` leaves it to the checkpoint; `omitted` keeps the thought from the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Fields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Fields):
    user_id: str | None = None


class CountBody(Fields):
    """The body of /v1/messages/count_tokens, and what /v1/messages has in common with it."""

    model: str
    messages: Annotated[Many[Message], Field(min_length=1)]
    system: Annotated[
        Many[TextBlock],
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
    ] = Field(default_factory=list)
    tools: Many[AnyTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    # Labels of the client's own, without influence on the answer
    user_profile_id: str | None = None
    workspace_id: str | None = None
    min_pixels: int | None = None
    max_pixels: MaxPixels = None

    impossible: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "this server calls no other; connect the tools in your own program",
    }


class MessagesBody(CountBody):
    """The body of /v1/messages. Sampling fields are Anthropic's, and this package's own."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: Many[Annotated[str, Field(min_length=1)]] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    timeout: float | None = None
    truncate: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: dict[str, Any] | None = None

    impossible: ClassVar[Mapping[str, str]] = {
        **CountBody.impossible,
        "container": "this server runs no code",
        "diagnostics": "usage.cache_read_input_tokens tells what was cached",
        "inference_geo": "this server computes on its own machine",
    }

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def sampling(self) -> dict[str, Any]:
        """By the names of SamplingParams."""
        wishes = {name: getattr(self, name) for name in _SAMPLING}
        return {**wishes, "stop": self.stop_sequences}
