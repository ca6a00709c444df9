"""jaxattn-generate: completes a file of prompts, each result on disk as soon as it is there."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NoReturn

from serving.batch_files import BatchPrompt, read_finished, read_prompts, result_line

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

DESCRIPTION = """\
Completes every prompt of a file with a model, in one continuous batch over a paged KV cache.
Results are written as they finish, one JSON line each; `index` is the prompt's place in its file.
"""
EPILOG = """\
prompts:
  FILE.txt    one prompt a line
  FILE.jsonl  one object a line: "prompt", "prompt_token_ids" or "messages", and if wanted "id" and
              "params", sampling parameters of that line alone: {"prompt": "Once", "params": {"top_k": 5}}
  -           either of them from standard input

examples:
  jaxattn-generate model.gguf --prompts questions.txt --chat --max-tokens 64 --out answers.jsonl
  jaxattn-generate runs/gpt2 --prompts openings.jsonl --temperature 0.8 --top-p 0.95 --out stories.jsonl
  jaxattn-generate runs/gpt2 --prompts openings.jsonl --out stories.jsonl --resume

exit codes: 0 all done; 2 wrong input, nothing was run; 130 interrupted, what is finished is kept.
"""


class UsageError(Exception):
    """Something the user can mend; its text is the one line they see."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help shows all options)")


def make_parser() -> Parser:
    parser = Parser(
        prog="jaxattn-generate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a training run"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--prompts", required=True, metavar="FILE", help=".jsonl, .txt or - (standard input)")
    files.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="where the results go")
    files.add_argument("--resume", action="store_true", help="keep the results in --out, do only the rest")
    files.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    files.add_argument("--chat", action="store_true", help="text prompts are messages to a chat model")
    _add_sampling_options(parser.add_argument_group("sampling (as in vLLM's SamplingParams)"))
    _add_engine_options(parser.add_argument_group("engine"))
    return parser


def _add_sampling_options(group: Any) -> None:
    group.add_argument("--max-tokens", type=int, default=128, help="new tokens at most (default 128)")
    group.add_argument("--min-tokens", type=int, help="no end before this many new tokens")
    group.add_argument("--temperature", type=float, help="0: always the likeliest token (default 1)")
    group.add_argument("--top-p", type=float, help="only the likeliest tokens whose probabilities reach P")
    group.add_argument("--top-k", type=int, help="only the K likeliest tokens")
    group.add_argument("--min-p", type=float, help="only tokens at least P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, help="on tokens of prompt and output (default 1)")
    group.add_argument("--presence-penalty", type=float, help="once for each token in the output (default 0)")
    group.add_argument("--frequency-penalty", type=float, help="for every time it is there (default 0)")
    group.add_argument("--n", type=int, help="samples of each prompt (default 1)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the text; may be given again")
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="each ends the output")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on to --max-tokens")
    group.add_argument("--logprobs", type=int, metavar="K", help="write the K likeliest tokens of each place")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="prompt i is sampled with seed + i, unless its line says (default 0)",
    )


def _add_engine_options(group: Any) -> None:
    group.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default auto)")
    group.add_argument(
        "--kv-cache-dtype", default="auto", help="of keys and values: auto (as --dtype), int8 or fp8"
    )
    group.add_argument(
        "--max-num-seqs", type=int, default=256, help="prompts that run together (default 256)"
    )
    group.add_argument("--max-model-len", type=int, help="tokens of a prompt and its output at most")
    group.add_argument("--page-size", type=int, default=16, help="tokens a page of the KV cache (default 16)")
    group.add_argument("--num-pages", type=int, help="pages of the KV cache (default: what memory holds)")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU's memory (default 0.9)"
    )


def main(argv: list[str] | None = None) -> int:
    try:
        return _run(make_parser().parse_args(argv))
    except UsageError as error:
        print(f"jaxattn-generate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("jaxattn-generate: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    """Everything that can be wrong is found before the model loads, or at the latest before it runs."""
    prompts = _read_prompts(args.prompts)
    finished = _prepare_out(args, prompts)
    remaining = [prompt for prompt in prompts if prompt.index not in finished]
    params = [_sampling_params(args, prompt) for prompt in remaining]
    if not remaining:
        print(f"{args.out}: all {len(prompts)} results are there, nothing to do")
        return 0
    llm = _load(args)
    encoded = [_encode(args, llm, *pair) for pair in zip(remaining, params, strict=True)]
    return _generate(args, llm, remaining, encoded, params, num_prompts=len(prompts))


def _generate(
    args: Any, llm: Any, remaining: list[BatchPrompt], encoded: Any, params: Any, *, num_prompts: int
):
    """Runs the batch and writes each result when it is there; the exit code."""
    import jax

    from serving.llm import advance, progress_bar

    num_done = num_prompts - len(remaining)
    run = llm.run(encoded, params)
    with (
        open(args.out, "a" if args.resume else "w", encoding="utf-8") as out,
        progress_bar(num_prompts, done=num_done) as bar,
    ):
        try:
            for index, output in run:
                out.write(result_line(remaining[index], output))
                out.flush()
                num_done += 1
                advance(bar, llm.metrics)
        except KeyboardInterrupt:
            run.close()
            bar.close()
            print(
                f"jaxattn-generate: interrupted, {num_done} of {num_prompts} results are in {args.out}; "
                "--resume does the rest",
                file=sys.stderr,
            )
            return EXIT_INTERRUPTED
    device = jax.devices()[0]
    print(f"{llm.metrics.summary()}; 1 x {device.device_kind}; results in {args.out}")
    return 0


def _read_prompts(name: str) -> list[BatchPrompt]:
    try:
        if name == "-":
            return read_prompts(sys.stdin, "standard input")
        with open(name, encoding="utf-8") as file:
            return read_prompts(file, name, is_jsonl={".jsonl": True, ".txt": False}.get(Path(name).suffix))
    except OSError as error:
        raise UsageError(f"--prompts {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {name}: not UTF-8: {error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _prepare_out(args: argparse.Namespace, prompts: list[BatchPrompt]) -> set[int]:
    """Indices of the prompts whose results are there already."""
    if args.resume and args.overwrite:
        raise UsageError("--resume keeps results that --overwrite replaces: give one of them")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise UsageError(f"--out {args.out}: must be a file in a folder that exists")
    if not args.out.exists() or args.overwrite:
        return set()
    if not args.resume:
        raise UsageError(f"--out {args.out}: exists; --resume does the rest, --overwrite starts anew")
    try:
        return read_finished(args.out, prompts)
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _sampling_params(args: argparse.Namespace, prompt: BatchPrompt) -> Any:
    """The parameters of one prompt: the options, and its own line above them."""
    from jaxattn.sampling import SamplingParams

    names = {field.name for field in dataclasses.fields(SamplingParams)} & vars(args).keys() - {"seed"}
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    seed = (args.seed + prompt.index) % 2**32
    try:
        return SamplingParams.from_dict({"seed": seed, **options, **prompt.params})
    except ValueError as error:
        raise UsageError(f"{prompt.source}: {error}" if prompt.params else str(error)) from None


def _load(args: argparse.Namespace) -> Any:
    from serving.llm import LLM

    try:
        return LLM(
            args.model,
            dtype=args.dtype,
            kv_cache_dtype=args.kv_cache_dtype,
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            page_size=args.page_size,
            num_pages=args.num_pages,
            gpu_memory_utilization=args.gpu_memory_utilization,
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _encode(
    args: argparse.Namespace, llm: Any, prompt: BatchPrompt, params: Any
) -> tuple[str | None, list[int]]:
    """Text and token ids of a prompt that can be served."""
    try:
        if prompt.kind == "messages":
            encoded = llm.encode_chat(prompt.content)
        elif prompt.kind == "prompt" and args.chat:
            encoded = llm.encode_chat([{"role": "user", "content": prompt.content}])
        else:
            encoded = llm.encode(prompt.content)
        llm.engine.check_request(encoded[1], params)
    except ValueError as error:
        raise UsageError(f"{prompt.source}: {error}") from None
    return encoded


if __name__ == "__main__":
    sys.exit(main())
