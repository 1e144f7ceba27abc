"""One stream of a completion: what may stand in it, and what it is called where it is broken or false."""

from __future__ import annotations

import json

import pytest
from measure.sse_server import MODEL, Script, Server, good

from qkit.measure.endpoint import stream
from qkit.measure.endpoint.address import parse
from qkit.measure.endpoint.request import Ask, Outcome, send
from qkit.measure.endpoint.stream import Broken, Events, Reply, message_of


def ask_of(server: Server, script: Script) -> Outcome:
    server.script = lambda number, body: script
    return send(
        parse(server.url), Ask("/completions", MODEL, 32, {"stream_options": {"include_usage": True}}), "x", 5.0
    )


def test_what_a_stream_may_look_like(serve):
    server = serve(good)
    assert ask_of(server, Script(a_chunk=8)).reason is None  # several tokens a chunk
    assert ask_of(server, Script(a_chunk=32)).reason == "usage is wrong"  # no stream: one chunk
    assert ask_of(server, Script(done=False)).reason is None  # finished, without the end's mark
    assert ask_of(server, Script(model="org/" + MODEL)).reason is None
    assert ask_of(server, Script(usage=False)).counted == "chunks"
    assert ask_of(server, Script(tokens=50, usage=32)).reason == "more tokens than asked"
    assert ask_of(server, Script(raw=b"")).reason == "stream cut short"
    assert ask_of(server, Script(raw=b"data: [DONE]\n\n")).reason == "no tokens"
    assert ask_of(server, Script(raw=b'data: {"choices": 3}\n\n')).reason == "malformed stream"
    assert ask_of(server, Script(raw=b"data: 3\n\n")).reason == "malformed stream"


def test_events_may_be_cut_anywhere():
    given = ': ping\r\n\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: x\nid: 1\ndata:two é\n\ndata: [DONE]\n'.encode()
    for size in (1, 2, 3, 7, len(given)):
        events = Events()
        found = [data for at in range(0, len(given), size) for data in events.feed(given[at : at + size])]
        assert found == ['{"a":\n1}', "two é"] and events.end() == ["[DONE]"]
    with pytest.raises(Broken):
        Events().feed(b"<html>\n")


def test_a_line_without_an_end_is_no_event(monkeypatch):
    monkeypatch.setattr(stream, "_LONGEST", 100)
    with pytest.raises(Broken, match="more than 100 bytes"):
        Events().feed(b"data: " + b"x" * 100)


def test_an_event_without_an_end_is_none(monkeypatch):
    monkeypatch.setattr(stream, "_LONGEST", 100)
    events = Events()
    with pytest.raises(Broken, match="more than 100 bytes"):
        for _ in range(100):
            assert events.feed(b"data: xxxx\n") == []


@pytest.mark.parametrize(
    "data", ["[" * 100_000, '{"choices": ' + "[" * 200 + "]" * 200 + "}", '{"a": "\\ud800"}', "9" * 5000]
)
def test_documents_that_nobody_could_walk_are_malformed(data):
    with pytest.raises(Broken, match="no JSON"):
        Reply().take(data, 0.0)


def test_counts_and_reasons_are_what_they_should_be():
    reply = Reply()
    usage = {"completion_tokens": 10**400, "prompt_tokens": 1 << 70}
    reply.take(json.dumps({"choices": [{"text": "", "finish_reason": ["x"]}], "usage": usage}), 0.0)
    assert (reply.usage, reply.prompt_tokens, reply.finish) == (None, None, None)


def test_which_chunks_carry_a_token():
    reply = Reply()
    chunks = [
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"delta": {"content": "a"}, "finish_reason": None},
        {"delta": {"reasoning_content": "b"}, "finish_reason": None},
        {"delta": {}, "finish_reason": "length"},
        {"text": "", "finish_reason": None},  # half a character
        {"text": "c", "finish_reason": "stop"},
        {"text": "", "finish_reason": "stop"},
    ]
    for at, choice in enumerate(chunks):
        reply.take(json.dumps({"choices": [choice]}), float(at))
    assert reply.arrivals == [1.0, 2.0, 4.0, 5.0] and reply.finish == "stop" and not reply.done


def test_messages_of_errors():
    assert message_of({"error": {"message": "a", "type": "b"}}) == message_of({"error": "a"}) == "a"
    assert message_of({"detail": [{"msg": "a", "loc": []}]}) == message_of({"message": "a"}) == "a"
    assert message_of({"detail": []}) == message_of(None) == message_of({"error": {}}) == message_of([3]) == ""
