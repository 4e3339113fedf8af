"""The OpenAI routes of the server, with the package `openai`."""

import asyncio
import dataclasses

import openai
import pytest
from test_serve import TOKEN, Access, model, protocol, serve  # noqa: F401

from msllm.errors import UserError
from msllm.serve.answers import stream_of
from msllm.streams import StreamSpec

MESSAGES = [
    {"role": "system", "content": "abc"},
    {"role": "user", "content": "def"},
    {"role": "assistant", "content": "ghi ghi"},
    {"role": "user", "content": [{"type": "text", "text": " abc"}, {"type": "text", "text": "d"}]},
]


def client_of(site, key=TOKEN):
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{site.port}/v1",
        websocket_base_url=f"ws://127.0.0.1:{site.port}/v1",
        api_key=key,
        max_retries=0,
    )


def test_chat_completions(serve):  # noqa: F811
    async def body(site):
        client = client_of(site)
        create = client.chat.completions.create
        options = {"model": "msllm", "messages": MESSAGES, "seed": 3, "max_tokens": 9}
        answer = await create(**options)
        (choice,) = answer.choices
        assert choice.finish_reason == "length" and answer.usage.completion_tokens == 9
        stream = await create(**options, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(texts) == choice.message.content
        assert chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason == "length"

        # The same session over a WebSocket says the same.
        encode = site.server.sessions.engine.model.tokenizer.encode
        silence = site.server.sessions.engine.silence_id
        first = encode("abc") + encode("def")
        said = [silence] * len(first) + encode("ghi ghi")
        events = [
            {"row": 0, "what": "force", "stream": "output", "text": said},
            {"row": 0, "what": "feed", "stream": "user", "text": first},
            {"row": len(said), "what": "feed", "stream": "user", "text": " abcd"},
        ]
        other = await site.open(
            token=TOKEN, sampling={"temperature": 1.0, "seed": 3}, events=events
        )
        await other.more(len(said) + 40)
        spoken = [row.text["output"] for row in other.rows[len(said) :] if "output" in row.text]
        assert "".join(spoken[:9]) == choice.message.content
        await other.send("close")
        assert await other.closed() == ("closed", 1000)
        assert (await client.models.list()).data[0].id == "msllm"
        assert site.server.sessions.engine.free == 3  # finished answers free their slots

        for wrong in (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"logprobs": True},
            {"n": 2},
            {"messages": MESSAGES[:3]},
            {"messages": []},
            {"temperature": -1},
            {"messages": [{"role": "user", "content": "x" * 5000}]},
        ):
            with pytest.raises(openai.BadRequestError):
                await create(**{**options, **wrong})
        with pytest.raises(openai.AuthenticationError):
            await client_of(site, "wrong").chat.completions.create(**options)
        held = [await site.open(token=TOKEN, paused=True) for _ in range(3)]
        with pytest.raises(openai.InternalServerError) as full:
            await create(**options)
        assert full.value.status_code == 503 and full.value.code == "full"
        assert full.value.response.headers["retry-after"] == "5"
        assert len(held) == 3

    serve(body, access=Access(TOKEN))


def test_realtime(serve):  # noqa: F811
    async def body(site):
        async with client_of(site).realtime.connect(model="msllm") as live:
            session = (await live.recv()).session
            assert session.output_modalities == ["text"]
            await live.session.update(session={"type": "realtime", "instructions": "abc"})
            assert (await live.recv()).type == "session.updated"
            await live.conversation.item.create(
                item={
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "def"}],
                }
            )
            kinds = [(await live.recv()).type for _ in range(2)]
            assert kinds == ["conversation.item.added", "conversation.item.done"]
            assert not site.server.sessions.open_ones[0].session.rows  # it waits
            await live.response.create()
            kinds, text = [], ""
            while "response.done" not in kinds:
                event = await live.recv()
                kinds.append(event.type)
                if event.type == "response.output_text.delta":
                    text += event.delta
                    if len(kinds) == 8:
                        await live.response.cancel()
                if event.type == "response.output_text.done":
                    assert event.text == text
            assert kinds[0] == "response.created" and event.response.status == "cancelled"
            for wrong in (
                {"type": "input_audio_buffer.append", "audio": ""},
                {"type": "session.update", "session": {"type": "realtime", "tools": []}},
                {"type": "response.cancel"},
            ):
                await live.send(wrong)
                event = await live.recv()
                assert event.type == "error" and event.error.code in (
                    "unsupported",
                    "response_cancel_not_active",
                )
            rows = site.server.sessions.open_ones[0].session.rows
            await asyncio.sleep(0.05)
            assert site.server.sessions.open_ones[0].session.rows == rows
        while site.server.sessions.open_ones:
            await asyncio.sleep(0.01)

    serve(body, access=Access(TOKEN))


def test_streams_of_roles(model):  # noqa: F811
    streams = model.streams
    assert [stream_of(role, streams) for role in ("system", "user", "assistant")] == [
        "user",
        "user",
        "output",
    ]
    with pytest.raises(UserError, match="no input stream for the role 'user'"):
        stream_of("user", dataclasses.replace(streams, kinds=("thought", "thought", "output")))
    assert isinstance(streams, StreamSpec)
