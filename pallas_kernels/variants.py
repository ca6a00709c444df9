"""Which variant of an op serves a call: the rule that all ops share."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.checks import check_choice


def choose(variants: Mapping[str, Any], implementation: str | None, *call: Any) -> str:
    """The variant that was named, or the first that is at home on this device and can serve the call.

    A variant has `is_available()`, whether this is the device it was written for, and `unsupported(*call)`,
    why it cannot serve a call or None. Raises ValueError for an unknown name, NotImplementedError where the
    variant named cannot serve.
    """
    if implementation is not None:
        check_choice("implementation", implementation, variants)
        if reason := variants[implementation].unsupported(*call):
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {reason}")
        return implementation
    return next(
        name
        for name, variant in variants.items()
        if variant.is_available() and not variant.unsupported(*call)
    )
