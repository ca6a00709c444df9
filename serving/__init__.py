"""Continuous batching over a page pool, with vLLM's names: `from serving import LLM, SamplingParams`.

Importing it touches no device; its parts are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxattn.sampling import SamplingParams
    from serving.engine import Engine
    from serving.llm import LLM
    from serving.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["LLM", "CompletionOutput", "Engine", "Logprob", "RequestOutput", "SamplingParams"]

_LAZY = {
    "CompletionOutput": "serving.outputs",
    "Engine": "serving.engine",
    "LLM": "serving.llm",
    "Logprob": "serving.outputs",
    "RequestOutput": "serving.outputs",
    "SamplingParams": "jaxattn.sampling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'serving' has no attribute {name!r}")
