"""The files of an offline batch: prompts in, one JSON line for each result out.

Results are written as they finish, so their order is not that of the prompts: `index` says which prompt each
belongs to. A file that a killed run left behind may end in half a line; reading it back drops that half.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from serving.outputs import CompletionOutput, RequestOutput

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
KEYS = ("id", *PROMPT_KEYS, "params")


@dataclass(frozen=True)
class BatchPrompt:
    """One line of a prompts file."""

    index: int  # among the prompts, from 0
    source: str  # "file, line 3": for error messages
    content: str | list[int] | list[Mapping[str, Any]]  # text, token ids, or the messages of a conversation
    kind: str  # which of PROMPT_KEYS
    id: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)  # sampling parameters of this line alone


def read_prompts(file: IO[str], name: str, *, is_jsonl: bool | None = None) -> list[BatchPrompt]:
    """The prompts of a text file (one a line) or of a JSON-lines file; empty lines are skipped.

    is_jsonl: None finds out: JSON lines if the first line that is not empty begins with "{".

    Raises ValueError that names the line for anything that is no prompt, and for a file without any.
    """
    lines = [(number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name}: no prompts in it")
    if is_jsonl is None:
        is_jsonl = lines[0][1].lstrip().startswith("{")
    prompts = []
    for index, (number, line) in enumerate(lines):
        source = f"{name}, line {number}"
        prompts.append(
            _parse_line(index, source, line) if is_jsonl else BatchPrompt(index, source, line, "prompt")
        )
    return prompts


def _parse_line(index: int, source: str, line: str) -> BatchPrompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{source}: malformed JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{source}: must be a JSON object, got {line.strip()[:40]}")
    if unknown := sorted(entry.keys() - set(KEYS)):
        raise ValueError(f"{source}: unknown keys {unknown}; allowed are {list(KEYS)}")
    kinds = [key for key in PROMPT_KEYS if key in entry]
    if len(kinds) != 1:
        raise ValueError(f"{source}: must have exactly one of {list(PROMPT_KEYS)}, has {kinds}")
    (kind,) = kinds
    if not _is_content(kind, entry[kind]):
        expected = {"prompt": "a string", "prompt_token_ids": "a list of integers"}
        raise ValueError(f"{source}: {kind} must be {expected.get(kind, 'a list of {role, content}')}")
    params = entry.get("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"{source}: params must be an object of sampling parameters")
    return BatchPrompt(index, source, entry[kind], kind, entry.get("id"), params)


def _is_content(kind: str, content: Any) -> bool:
    if kind == "prompt":
        return isinstance(content, str)
    if not isinstance(content, list):
        return False
    if kind == "prompt_token_ids":
        return all(type(token) is int for token in content)
    is_message = lambda m: isinstance(m, dict) and {"role", "content"} <= m.keys()
    return bool(content) and all(map(is_message, content))


def result_line(prompt: BatchPrompt, output: RequestOutput) -> str:
    """One result as a line of JSON, its newline included."""
    result = {"index": prompt.index}
    if prompt.id is not None:
        result["id"] = prompt.id
    result |= {
        prompt.kind: prompt.content,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "outputs": [_completion(completion) for completion in output.outputs],
    }
    return json.dumps(result, ensure_ascii=False) + "\n"


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        result["cumulative_logprob"] = completion.cumulative_logprob
        result["logprobs"] = [
            {token: entry._asdict() for token, entry in entries.items()} for entries in completion.logprobs
        ]
    return result


def read_finished(path: Path, prompts: Sequence[BatchPrompt]) -> set[int]:
    """Indices of the prompts whose results stand in a file, after cutting off half a line at its end.

    Raises ValueError for a line that is no result, or the result of another prompt.
    """
    finished: set[int] = set()
    with open(path, "rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.seek(-len(line), os.SEEK_CUR)
                file.truncate()
                break
            finished.add(_finished_index(f"{path}, line {number}", line, prompts))
    return finished


def _finished_index(source: str, line: bytes, prompts: Sequence[BatchPrompt]) -> int:
    try:
        result = json.loads(line)
        index = result["index"]
        prompt = prompts[index]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"{source}: not a result of these prompts; --overwrite starts anew") from None
    if result.get(prompt.kind) != prompt.content or result.get("id") != prompt.id:
        raise ValueError(
            f"{source}: the result of another prompt than {prompt.source}; --overwrite starts anew"
        )
    return index
