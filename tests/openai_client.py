#!/usr/bin/env python3
"""The official OpenAI client, unmodified, against a running `moebius serve`.

    python tests/openai_client.py http://127.0.0.1:8080/v1

Any model will do: what is checked is the protocol, not the words. Exits non-zero at the first failed check. The key is
read from MOEBIUS_API_KEY, if there is one.
"""

import asyncio
import os
import sys

import openai

MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "Say something."}]},
]


def check(condition: bool, what: object) -> None:
    # Not `assert`, which -O removes.
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def check_usage(usage, choices: int = 1) -> None:
    check(usage is not None and usage.prompt_tokens > 0, usage)
    check(choices <= usage.completion_tokens <= 8 * choices, usage)
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage)


def models(client: openai.OpenAI) -> str:
    listed = client.models.list()
    check(listed.object == "list" and len(listed.data) >= 1, listed)
    model = listed.data[0].id
    check(client.models.retrieve(model).id == model, "models.retrieve")
    return model


def chats(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**options)
    check(whole.object == "chat.completion" and whole.model == model, whole)
    choice = whole.choices[0]
    check(choice.message.role == "assistant" and choice.message.content is not None, choice)
    check(choice.finish_reason in ("stop", "length"), choice)
    check_usage(whole.usage)

    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    check(len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1, "one id per stream")
    check(chunks[0].choices[0].delta.role == "assistant", chunks[0])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    check(text == choice.message.content, "greedy decoding is the same streamed and whole")
    check(chunks[-2].choices[0].finish_reason == choice.finish_reason, chunks[-2])
    check(chunks[-1].choices == [], chunks[-1])
    check_usage(chunks[-1].usage)
    check(all(chunk.usage is None for chunk in chunks[:-1]), "usage comes last")

    several = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=8, n=2, logprobs=True, top_logprobs=2, stop=["\n\n\n"]
    )
    check([choice.index for choice in several.choices] == [0, 1], several)
    check_usage(several.usage, choices=2)
    for entry in several.choices[0].logprobs.content:
        check(entry.logprob <= 0 and len(entry.top_logprobs) == 2 and entry.bytes is not None, entry)


def completions(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**options, echo=True)
    check(whole.object == "text_completion", whole)
    check(whole.choices[0].text.startswith("Once upon a time"), whole)
    check_usage(whole.usage)
    chunks = list(client.completions.create(**options, stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    check("Once upon a time" + text == whole.choices[0].text, "the same streamed and whole")
    check(chunks[-1].choices[0].finish_reason in ("stop", "length"), chunks[-1])
    batch = client.completions.create(model=model, prompt=["One", "Two"], max_tokens=8, logprobs=1)
    check([choice.index for choice in batch.choices] == [0, 1], batch)
    check_usage(batch.usage, choices=2)
    check(len(batch.choices[0].logprobs.tokens) == len(batch.choices[0].logprobs.token_logprobs), batch)


def errors(client: openai.OpenAI, model: str) -> None:
    def refused(kind: type, code: str, param: str | None, **changes) -> None:
        options = {"model": model, "messages": MESSAGES, "max_tokens": 8} | changes
        try:
            client.chat.completions.create(**options)
        except openai.APIStatusError as error:
            check(type(error) is kind and (error.code, error.param) == (code, param), repr(error))
            check(error.response.headers.get("x-request-id"), "every answer has a request id")
        else:
            raise SystemExit(f"FAILED: accepted {changes}")

    refused(openai.BadRequestError, "invalid_value", "n", n=10**9)
    refused(openai.BadRequestError, "invalid_value", "temperature", temperature=-1)
    refused(openai.BadRequestError, "invalid_value", "messages", messages=[])
    refused(openai.BadRequestError, "unsupported_value", "response_format", response_format={"type": "json_object"})
    refused(openai.BadRequestError, "invalid_value", "top_k", extra_body={"top_k": "x"})
    refused(openai.NotFoundError, "model_not_found", "model", model="no-such-model")
    refused(openai.NotFoundError, "model_not_found", "model", model="no-such-model", stream=True)
    try:
        client.models.retrieve("no-such-model")
    except openai.NotFoundError:
        pass
    else:
        raise SystemExit("FAILED: found a model that is not there")


def wrong_key(base_url: str) -> None:
    try:
        openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError as error:
        check(error.code == "invalid_api_key", repr(error))
    else:
        raise SystemExit("FAILED: a wrong key was accepted")


async def hang_up(base_url: str, key: str, model: str) -> None:
    """Leaves streams in the middle; the server must go on."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        for _ in range(10):
            stream = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
            await anext(aiter(stream))
            await stream.close()
        many = (client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4) for _ in range(8))
        answers = await asyncio.gather(*many)
        check(len({answer.id for answer in answers}) == 8, "ids are unique")


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
    key = os.environ.get("MOEBIUS_API_KEY", "none")
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    model = models(client)
    chats(client, model)
    completions(client, model)
    errors(client, model)
    if "MOEBIUS_API_KEY" in os.environ:
        wrong_key(base_url)
    asyncio.run(hang_up(base_url, key, model))
    print(f"ok: openai {openai.__version__}, model {model}")


if __name__ == "__main__":
    main()
