"""Every error a user can cause or meet: what was wrong, what was expected, what to do.

`InputError` and its kin are the caller's to mend (exit status 2 on the command line); the rest are
the checkpoint's, the Hub's or the machine's (exit status 1).
"""


class Qwen3VLError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = 1


class InputError(Qwen3VLError, ValueError):
    """A value the caller gave is wrong; the message names it."""

    exit_code = 2


class ImageError(InputError):
    """An image could not be read, decoded or used."""


class UnsupportedImageError(ImageError):
    """The bytes are no image of a format that can be read."""


class TooLargeError(ImageError):
    """An image is over a limit: of bytes, of pixels, or of the work to decode it."""


class PromptError(InputError):
    """Messages, media and placeholders do not fit together."""


class TooLongError(PromptError):
    """The prompt leaves no room for an answer in the model's context."""


class CheckpointError(Qwen3VLError):
    """A checkpoint folder is missing, incomplete or damaged."""


class ConfigError(CheckpointError):
    """config.json is unknown or contradicts itself; the message names the key."""


class WeightsError(CheckpointError):
    """A tensor is missing, surplus or misshapen; the message names it."""


class HubError(Qwen3VLError):
    """The Hub could not be reached, or does not hold what was asked for."""


class OutputError(Qwen3VLError):
    """A file or folder could not be written; nothing half-made is left."""


class QueueFullError(Qwen3VLError):
    """Too many requests wait for the model already; ask again later."""


class EngineClosedError(Qwen3VLError):
    """The model was closed, or its thread has failed."""


class ForkedProcessError(Qwen3VLError):
    """A forked child asked for a model; MLX cannot be used there."""
