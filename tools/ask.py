"""Have a server continue the text on standard input, through the openai client.

echo 'Once upon a time' | python -m tools.ask http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import sys

from openai import APIConnectionError, APIStatusError, OpenAI


def main() -> int:
    """Print the continuation and what was counted; return 1 where there is none."""
    parser = argparse.ArgumentParser(prog="python -m tools.ask", description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    try:
        answer = client.completions.create(
            model="default", prompt=sys.stdin.read().rstrip("\n"), max_tokens=args.max_tokens, temperature=0
        )
    except APIConnectionError:
        print(f"no server answers at {args.url}; start one: make serve", file=sys.stderr)
        return 1
    except APIStatusError as error:
        print(f"the server refused it: {error.message}", file=sys.stderr)
        return 1
    print(answer.choices[0].text.strip())
    print(f"({answer.usage.prompt_tokens:,} tokens read, {answer.usage.completion_tokens} generated)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
