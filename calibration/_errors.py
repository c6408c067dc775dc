"""Errors of the library: one small tree, each also an instance of the fitting builtin."""

from __future__ import annotations


class AdaptiveError(Exception):
    """Base of every error that the library raises on purpose."""


class InvalidArgumentError(AdaptiveError, ValueError):
    """An argument has a value that is not allowed.

    Parameters
    ----------
    argument : str
        Name of the argument as the caller wrote it.
    value : object
        The value received, or a short description of the part of it that is wrong.
    expected : str
        What is allowed, completing the sentence "`argument` must be ...".

    Examples
    --------
    >>> print(InvalidArgumentError("risk", 1.5, "in (0, 1)"))
    `risk` must be in (0, 1), got 1.5
    """

    def __init__(self, argument: str, value: object, expected: str) -> None:
        self.argument = argument
        self.value = value
        self.expected = expected
        super().__init__(f"`{argument}` must be {expected}, got {_short(value)}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.argument, self.value, self.expected)


class InvalidTypeError(AdaptiveError, TypeError):
    """An argument has a type that is not allowed; parameters as `InvalidArgumentError`."""

    def __init__(self, argument: str, value: object, expected: str) -> None:
        self.argument = argument
        self.value = value
        self.expected = expected
        super().__init__(
            f"`{argument}` must be {expected}, got {_short(value)} of type {type(value).__name__}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.argument, self.value, self.expected)


class CertificateError(AdaptiveError, ValueError):
    """A certificate cannot be read: damaged, incomplete, or of an unknown schema version."""


class CertificateMismatchError(AdaptiveError, RuntimeError):
    """A policy was asked to run outside the conditions that its certificate was earned under."""


class UnsupportedError(AdaptiveError, ValueError):
    """A named feature, model family or combination that is not supported."""


def _short(value: object) -> str:
    text = value if isinstance(value, str) and " " in value else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
