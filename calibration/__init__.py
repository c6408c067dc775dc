"""Statistics for adaptive computation: arrays in, certificates out (no torch)."""

from adaptive.calibration._errors import (
    AdaptiveError,
    CertificateError,
    CertificateMismatchError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)

__all__ = [
    "AdaptiveError",
    "CertificateError",
    "CertificateMismatchError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "UnsupportedError",
]
