"""Errors that end a command with one sentence: what is wrong, where, and how to fix it."""


class NmonnxError(Exception):
    """Base of every error the user can mend; `exit_code` is what the command line returns."""

    exit_code = 2


class UsageError(NmonnxError):
    """A flag, a pattern, a selector or a recipe asks for something that cannot be."""


class UnknownWord(UsageError):
    """A name or a number that stands for nothing, most likely mistyped; other UsageErrors may be choices that do not
    go together."""


class Unseen(UsageError):
    """Statistics were asked for a layer that calibration could not see; `reason` says why, without its name."""

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"layer {site!r} has no activation statistics: {reason}")
        self.reason = reason


class InputError(NmonnxError):
    """A file that was given is not what it should be: not a model, truncated, data missing."""


class ModelError(NmonnxError):
    """A model could not be loaded into ONNX Runtime, or could not be written."""

    exit_code = 3


class RunError(NmonnxError):
    """ONNX Runtime failed while it ran a model."""

    exit_code = 4
