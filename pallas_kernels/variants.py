"""Which variant of an op serves a call: the rule that all ops share."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from pallas_kernels import device
from pallas_kernels.checks import check_choice

logger = logging.getLogger("pallas_kernels")


class Unsupported(NotImplementedError):
    """An implementation cannot serve a call that is right; another may."""


def choose(op: str, variants: Mapping[str, Any], implementation: str | None, *call: Any) -> str:
    """The variant that was named, or the first that is at home on this device and can serve the call.

    A variant has `is_available()`, whether this is the device it was written for, and `unsupported(*call)`,
    why it cannot serve a call or None. What was chosen, and why no other, is logged once for each op. Raises
    ValueError for an unknown name, Unsupported where the variant named cannot serve or run here; what is
    lowered for an abstract GPU may be of any variant.
    """
    if implementation is not None:
        check_choice("implementation", implementation, variants)
        variant = variants[implementation]
        if reason := variant.unsupported(*call):
            raise Unsupported(f"implementation={implementation!r} cannot serve this call: {reason}")
        if not (variant.is_available() or device.is_abstract_gpu()):
            here = ", ".join(repr(name) for name, other in variants.items() if other.is_available())
            where = f"{device.device_name()}, where {op} has {here}"
            raise Unsupported(f"implementation={implementation!r} does not run on {where}")
        return implementation
    refusals = []
    for name, variant in variants.items():
        if not variant.is_available():
            continue
        if reason := variant.unsupported(*call):
            refusals.append(f"{name!r} cannot serve this call: {reason}")
            continue
        announce(logger, op, name, device.device_name(), "; ".join(refusals))
        return name
    raise Unsupported(f"no implementation on {device.device_name()} serves this call: {'; '.join(refusals)}")


@functools.cache  # one sentence for each answer, not one for each layer
def announce(log: logging.Logger, op: str, name: str, where: str, refusals: str) -> None:
    """Logs which implementation computes an op, and why not the ones before it."""
    level = logging.WARNING if refusals else logging.INFO
    because = f"because {refusals}" if refusals else "the first choice there"
    log.log(level, "%s on %s is computed by %r: %s", op, where, name, because)
