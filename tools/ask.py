"""Talk to a server through the openai client.

python -m tools.ask URL                                  # a conversation, until Ctrl-D
cat DESIGN.md | python -m tools.ask URL 'What is FreeKV?'  # a question, here about a text
echo 'Once upon a time' | python -m tools.ask URL        # a text to continue, for models that do not chat
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

from httpx import HTTPError
from openai import APIConnectionError, APIError, APIStatusError, OpenAI
from openai.types import CompletionUsage

_CONTINUED_TOKENS, _ANSWER_TOKENS = 32, 256  # at most, by default

_REPETITION = 0.3  # small models repeat themselves without end


def main() -> int:
    """Print what is answered and what was counted; return 1 where there is no answer."""
    args = _parse()
    text = "" if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    try:
        if text and not args.question:
            _continue(client, text, args.max_tokens or _CONTINUED_TOKENS)
        else:
            questions = [f"{text}\n\n{args.question}".lstrip()] if args.question else _typed()
            _converse(client, questions, args.max_tokens or _ANSWER_TOKENS)
    except APIConnectionError:
        print(f"no server answers at {args.url}; start one: make serve", file=sys.stderr)
        return 1
    except APIStatusError as error:
        print(f"the server refused it: {error.message}", file=sys.stderr)
        return 1
    except (APIError, HTTPError) as error:
        print(f"\nthe answer broke off: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000")
    parser.add_argument("question", nargs="?", help="about the text on standard input, if one is piped in")
    parser.add_argument("--max-tokens", type=int, help="of an answer")
    return parser.parse_args()


def _continue(client: OpenAI, text: str, max_tokens: int) -> None:
    answer = client.completions.create(model="default", prompt=text, max_tokens=max_tokens, temperature=0)
    print(answer.choices[0].text.strip())
    _print_counts(answer.usage)


def _converse(client: OpenAI, questions: Iterable[str], max_tokens: int) -> None:
    """Answer one question after the other, each with all before it."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = _print_answer(client, messages, max_tokens)
        messages.append({"role": "assistant", "content": answer})


def _typed() -> Iterator[str]:
    """Questions from the keyboard."""
    print("Type a question; Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question:
            yield question


def _print_answer(client: OpenAI, messages: list[dict[str, str]], max_tokens: int) -> str:
    """Print the answer as it comes; return it."""
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        frequency_penalty=_REPETITION,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer, usage = "", None
    for part in stream:
        usage = part.usage or usage
        words = (part.choices[0].delta.content or "") if part.choices else ""
        print(words, end="", flush=True)
        answer += words
    print()
    if usage is not None:
        _print_counts(usage)
    return answer


def _print_counts(usage: CompletionUsage) -> None:
    print(f"({usage.prompt_tokens:,} tokens read, {usage.completion_tokens} generated)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
