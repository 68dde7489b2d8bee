"""Talk to a server through the openai client: a conversation, one question, or a text that it continues.

    python -m tools.ask URL                                       # a conversation, until Ctrl-D
    python -m tools.ask URL --about DESIGN.md                     # a conversation about a text
    python -m tools.ask URL --about DESIGN.md 'What is sealed?'   # one question
    echo 'Once upon a time' | python -m tools.ask URL --continue  # no chat template, no turns
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from openai import APIConnectionError, APIStatusError, OpenAI


def main() -> int:
    """Print what is answered and what was counted; return 1 where there is no answer."""
    args = _parse()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    try:
        if args.continues:
            _continue(client, sys.stdin.read().rstrip("\n"), args)
        else:
            _converse(client, [args.question] if args.question else _typed(), args)
    except APIConnectionError:
        print(f"no server answers at {args.url}; start one: make serve", file=sys.stderr)
        return 1
    except APIStatusError as error:
        print(f"the server refused it: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000")
    parser.add_argument("question", nargs="?", help="without it they are typed")
    parser.add_argument("--about", type=Path, metavar="FILE", help="a text that comes before the first question")
    parser.add_argument("--continue", action="store_true", dest="continues", help="continue standard input")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: 32 with --continue, else 256)")
    args = parser.parse_args()
    if args.about and not args.about.is_file():
        parser.error(f"--about {args.about} is no file; name a text, such as DESIGN.md")
    return args


def _continue(client: OpenAI, text: str, args: argparse.Namespace) -> None:
    answer = client.completions.create(model="default", prompt=text, max_tokens=args.max_tokens or 32, temperature=0)
    print(answer.choices[0].text.strip())
    _print_counts(answer.usage)


def _converse(client: OpenAI, questions: Iterable[str], args: argparse.Namespace) -> None:
    """Answer one question after the other, each with all before it."""
    messages: list[dict[str, str]] = []
    text = f"{args.about.read_text()}\n\n" if args.about else ""
    for question in questions:
        messages.append({"role": "user", "content": text + question})
        answer, text = _print_answer(client, messages, args.max_tokens or 256), ""
        messages.append({"role": "assistant", "content": answer})


def _typed() -> Iterator[str]:
    """Questions from the keyboard."""
    print("Type a question, Ctrl-D to end.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question:
            yield question


def _print_answer(client: OpenAI, messages: list[dict[str, str]], max_tokens: int) -> str:
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer = []
    for part in stream:
        if part.choices:
            answer.append(part.choices[0].delta.content or "")
            print(answer[-1], end="", flush=True)
        if part.usage:
            usage = part.usage
    print()
    _print_counts(usage)
    return "".join(answer)


def _print_counts(usage) -> None:
    print(f"({usage.prompt_tokens:,} tokens read, {usage.completion_tokens} generated)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
