"""Everything that can go wrong, as one tree.

AdaptError
├── ArgumentError         an argument is missing, or of another kind than is taken
├── ModelFileError        a model file that cannot be read as what it claims to be
│   ├── ExternalDataError     data beside a model that is missing, short or out of bounds
│   └── SaveError             a result that cannot be written
├── SiteError             a place in a graph that was asked for
│   ├── SiteNotFoundError     no such place
│   ├── AmbiguousSiteError    several such places
│   └── SiteRefusedError      the place is there and cannot take an adapter
├── SlotError             a slot that cannot be built, or that another tool damaged
├── AdapterError          an adapter file is damaged, or does not fit the model
│   └── AdapterNotFoundError  no adapter of this name is loaded
├── CheckpointError       a trained checkpoint that cannot be read, mapped or supported
├── ManifestError         the record of slots in a model is unreadable or too new
├── GradientError         a graph that cannot be differentiated where it is asked for
├── TrainingError         an adapter that cannot be trained as asked
├── RunError              ONNX Runtime, the checker or the inliner refused a model
├── RequestError          a request that a server refuses, with its HTTP status
├── UnprovableError       nothing can be proven: the base does not run here
└── MismatchError         a verification failed

UncheckedWarning is no error: an adapter is used that does not say what it is for.
"""

from __future__ import annotations

from onnx_adapt.spelling import in_python

__all__ = [
    "AdaptError",
    "AdapterError",
    "AdapterNotFoundError",
    "AmbiguousSiteError",
    "ArgumentError",
    "CheckpointError",
    "ExternalDataError",
    "GradientError",
    "ManifestError",
    "MismatchError",
    "ModelFileError",
    "RequestError",
    "RunError",
    "SaveError",
    "SiteError",
    "SiteNotFoundError",
    "SiteRefusedError",
    "SlotError",
    "TrainingError",
    "UncheckedWarning",
    "UnprovableError",
]


class AdaptError(Exception):
    """Any failure that onnx-adapt reports, with a message and the next step.

    `str(error)` is both, the step in the words of Python. The command line prints `hint` as
    it is, which is in its own words.

    Args:
        message: What went wrong and where: it names the node, tensor or file.
        hint: What to do about it; by default the class's `advice`.

    Attributes:
        advice: What to do where the message says it all.

    Example:
        >>> raise AdaptError("no slot is called 'fr'", hint="see `onnx-adapt slots`")
        Traceback (most recent call last):
        ...
        onnx_adapt.errors.AdaptError: no slot is called 'fr'
        hint: see `oa.list_slots`
    """

    advice = "see the README or `onnx-adapt --help`"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.advice

    def __str__(self) -> str:
        """The message and the hint, for who meets the error in Python."""
        return in_python(f"{self.message}\nhint: {self.hint}")


class ArgumentError(AdaptError, TypeError):
    """An argument is missing, or of another kind than a function takes."""

    advice = "`help(onnx_adapt)` has a map of the functions"


class ModelFileError(AdaptError, ValueError):
    """A file is not an ONNX model, or is cut off."""

    advice = "export or copy the model again"


class ExternalDataError(ModelFileError):
    """The data beside a model is missing, too short, or outside its folder."""


class SaveError(AdaptError, OSError):
    """A result cannot be written; the destination is as it was."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        AdaptError.__init__(self, message, hint=hint)


class SiteError(AdaptError, ValueError):
    """A place in a graph cannot be used."""

    advice = "`onnx-adapt sites` lists the places that can take an adapter"


class SiteNotFoundError(SiteError, LookupError):
    """Nothing in the model has this name."""


class AmbiguousSiteError(SiteError, LookupError):
    """The name means several places."""


class SiteRefusedError(SiteError):
    """The named tensor cannot take an adapter."""


class SlotError(AdaptError, ValueError):
    """A slot cannot be built as asked, or is damaged."""

    advice = "`onnx-adapt slots` and `onnx-adapt check` show what the model has"


class AdapterError(AdaptError, ValueError):
    """An adapter cannot be read, written or used with a model."""

    advice = "`onnx-adapt check` lists everything that does not fit"


class AdapterNotFoundError(AdapterError, LookupError):
    """A session has no adapter of this name."""


class CheckpointError(AdaptError, ValueError):
    """A trained checkpoint cannot be read, is not supported, or does not fit the model."""

    advice = "save the adapter again with its library, or merge it in PyTorch and export again"


class ManifestError(AdaptError, ValueError):
    """The record of the slots inside a model cannot be used."""

    advice = "insert into the base model again"


class GradientError(AdaptError, ValueError):
    """A graph cannot be differentiated between a loss and the weights that are to train."""

    advice = "export the model in opset 17 or newer, without fusing its nodes"


class TrainingError(AdaptError, ValueError):
    """An adapter cannot be trained with this model, data or setting.

    Attributes:
        trained: What was trained before a loss was not finite, as `train` returns it; None
            if nothing was.
    """

    advice = "docs/train.md tells what training needs"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.trained: object | None = None


class RunError(AdaptError, RuntimeError):
    """A model was refused by ONNX Runtime, the ONNX checker or the inliner."""


class RequestError(AdaptError, ValueError):
    """A server refuses a request.

    Attributes:
        status: The HTTP status that says so.
    """

    advice = "docs/serving.md tells what the server takes"

    def __init__(self, message: str, *, hint: str = "", status: int = 400) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class UnprovableError(AdaptError, RuntimeError):
    """The base model does not run here, so nothing can be compared with it."""


class MismatchError(AdaptError, AssertionError):
    """A verification failed; raised by `Report.raise_for_mismatch`."""


def reason(error: BaseException) -> str:
    """What an error says as a part of another message: one of ours without its hint."""
    return error.message if isinstance(error, AdaptError) else str(error)


class UncheckedWarning(UserWarning):
    """An adapter does not tell its base or its activations, so they cannot be checked.

    `make_adapter` makes one that does; `insert`, `convert` and `extract` write such files.
    """
