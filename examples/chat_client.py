#!/usr/bin/env python3
"""Chats with a running `moebius serve` through the official OpenAI client (`pip install openai`).

    moebius serve demo &
    python examples/chat_client.py --base-url http://127.0.0.1:8080/v1
"""

import argparse
import os
import sys

from openai import OpenAI, OpenAIError


def stream_answer(client: OpenAI, model: str, messages: list[dict]) -> str:
    """Prints the answer as it comes and returns it whole."""
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    answer, usage = [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content or ""
            answer.append(text)
            print(text, end="", flush=True)
    print()
    if usage:
        print(f"[{usage.prompt_tokens} + {usage.completion_tokens} tokens]", file=sys.stderr)
    return "".join(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("prompt", nargs="*", help="one question; none = a conversation")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key=os.environ.get("MOEBIUS_API_KEY", "none"))
    try:
        model = client.models.list().data[0].id
        if arguments.prompt:
            stream_answer(client, model, [{"role": "user", "content": " ".join(arguments.prompt)}])
            return
        messages: list[dict] = []
        while line := input("> ").strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": stream_answer(client, model, messages)})
    except EOFError:
        print()
    except OpenAIError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
