"""A server on loopback that speaks OpenAI's chat completions and Anthropic's messages, in a thread of its own; what it answers is told to it step by step."""
import asyncio, json, threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

@dataclass
class Step:
    "One answer."
    text: str = 'Hello.'          # what is said
    calls: tuple = ()             # (name, arguments as a dict) of tools called
    finish: str = 'stop'          # 'stop' or 'length'; anything else is sent as it is
    status: int = 200
    headers: dict = field(default_factory=dict)
    body: Any = None              # in place of a completion: JSON values, or bytes
    delay: float = 0.             # seconds before the answer, or before each piece of a stream
    cut: int | None = None        # bytes of the answer, or pieces of a stream, after which the line goes dead
    error: str | None = None      # in a stream: an error event of this kind in place of the end
    usage: tuple | None = (7, 3)  # tokens in and out

def content(said, status=200, more='', length=None):
    "An HTTP answer; `length` is what it says of itself."
    return f'HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}Content-Length: {len(said) if length is None else length}\r\n\r\n'.encode() + said

class LoopbackServer:
    "An HTTP server in a thread with a loop of its own. Below it: `async reply(writer, path, body)`, true where the line goes dead after it."
    def __init__(self):
        self.heads, self.asked, self.dropped, self.open, self.most = [], [], 0, 0, 0
        self.loop, self.ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    def run(self):
        asyncio.set_event_loop(self.loop)
        self.server = self.loop.run_until_complete(asyncio.start_server(self.talk, '127.0.0.1', 0))
        self.root = f'http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}'
        self.url = self.root + '/v1'   # for OpenAI's client; Anthropic's takes `root`
        self.ready.set()
        self.loop.run_forever()
        self.server.close()
        rest = asyncio.all_tasks(self.loop)
        for t in rest: t.cancel()
        self.loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        self.loop.close()

    def stop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def talk(self, reader, writer):
        "One connection: many requests, and an eye on whether the other side still listens."
        try:
            while head := (await reader.readuntil(b'\r\n\r\n')).decode():
                size = next((int(x.split(':')[1]) for x in head.split('\r\n') if x.lower().startswith('content-length')), 0)
                body = json.loads(await reader.readexactly(size) or b'null')
                self.heads.append(head)
                self.open += 1; self.most = max(self.most, self.open)
                work, gone = asyncio.ensure_future(self.reply(writer, head.split()[1], body)), asyncio.ensure_future(reader.read(1))
                try:
                    await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not work.done(): self.dropped += 1; return
                    if work.exception() is not None or work.result(): return
                finally:
                    self.open -= 1
                    for t in (work, gone): t.cancel()
                    await asyncio.gather(work, gone, return_exceptions=True)
        except (asyncio.IncompleteReadError, ConnectionError): pass
        finally: writer.close()

class ProviderServer(LoopbackServer):
    "`script`: a list of steps, one for each request and the last again after that, or a function of (parsed body) -> Step."
    def __init__(self, script=None):
        self.script, self.paths = [Step()] if script is None else script, []
        super().__init__()

    def step(self, body):
        if callable(self.script): return self.script(body)
        return self.script[min(len(self.asked) - 1, len(self.script) - 1)]

    async def reply(self, writer, path, body):
        self.paths.append(path); self.asked.append(body)
        s, streamed = self.step(body), bool(body and body.get('stream'))
        await (self.events if streamed and s.status == 200 and s.body is None else self.whole)(writer, path, body, s)
        return streamed or s.cut is not None

    async def events(self, writer, path, body, s):
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n')
        for i, line in enumerate((anthropic_events if path.endswith('/messages') else openai_events)(body, s)):
            if s.cut is not None and i >= s.cut: await writer.drain(); return
            await asyncio.sleep(s.delay)
            b = line.encode()
            writer.write(b'%x\r\n%s\r\n' % (len(b), b))
            await writer.drain()
        writer.write(b'0\r\n\r\n'); await writer.drain()

    async def whole(self, writer, path, body, s):
        await asyncio.sleep(s.delay)
        said = s.body if s.body is not None else refusal(s.status) if s.status != 200 else (anthropic_reply if path.endswith('/messages') else openai_reply)(body, s)
        said = said if isinstance(said, bytes) else json.dumps(said).encode()
        writer.write(content(said[:s.cut], s.status, ''.join(f'{k}: {v}\r\n' for k, v in s.headers.items()), len(said)))
        await writer.drain()

def refusal(status): return {'type': 'error', 'error': {'type': 'refused', 'message': f'no, thank you ({status})'}}

def openai_reply(body, s):
    m = {'role': 'assistant', 'content': None if s.calls else s.text}
    if s.calls: m['tool_calls'] = [{'id': f'c{i}', 'type': 'function', 'function': {'name': n, 'arguments': json.dumps(a)}} for i, (n, a) in enumerate(s.calls)]
    d = {'id': 'chat-1', 'object': 'chat.completion', 'created': 0, 'model': body['model'] + '-2026',
         'choices': [{'index': 0, 'message': m, 'finish_reason': 'tool_calls' if s.calls and s.finish == 'stop' else s.finish}]}
    return d if s.usage is None else d | {'usage': {'prompt_tokens': s.usage[0], 'completion_tokens': s.usage[1], 'total_tokens': sum(s.usage)}}

def anthropic_reply(body, s):
    "Where a tool is forced, the text is its input."
    forced = (body.get('tool_choice') or {}).get('type') == 'tool'
    calls = [(body['tool_choice']['name'], json.loads(s.text))] if forced else s.calls
    blocks = [] if forced else [{'type': 'text', 'text': s.text}] if s.text else []
    blocks += [{'type': 'tool_use', 'id': f't{i}', 'name': n, 'input': a} for i, (n, a) in enumerate(calls)]
    end = {'stop': 'tool_use' if calls else 'end_turn', 'length': 'max_tokens'}.get(s.finish, s.finish)
    d = {'id': 'msg_1', 'type': 'message', 'role': 'assistant', 'model': body['model'] + '-2026', 'content': blocks, 'stop_reason': end, 'stop_sequence': None}
    return d if s.usage is None else d | {'usage': {'input_tokens': s.usage[0], 'output_tokens': s.usage[1]}}

def pieces(text): return [text[i:i + 4] for i in range(0, len(text), 4)]

def openai_events(body, s):
    def chunk(delta, finish=None): return 'data: ' + json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'created': 0, 'model': body['model'] + '-2026',
                                                                'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]}) + '\n\n'
    yield from (chunk({'content': p}) for p in pieces(s.text))
    if s.error: yield 'data: ' + json.dumps({'error': {'message': s.error, 'type': s.error}}) + '\n\n'; return
    yield chunk({}, s.finish)
    if s.usage and body.get('stream_options', {}).get('include_usage'):
        yield 'data: ' + json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'created': 0, 'model': body['model'] + '-2026', 'choices': [], 'usage': {'prompt_tokens': s.usage[0], 'completion_tokens': s.usage[1], 'total_tokens': sum(s.usage)}}) + '\n\n'
    yield 'data: [DONE]\n\n'

def anthropic_events(body, s):
    def event(kind, **d): return f'event: {kind}\ndata: ' + json.dumps({'type': kind} | d) + '\n\n'
    n, m = s.usage or (0, 0)
    yield event('message_start', message={'id': 'm', 'type': 'message', 'role': 'assistant', 'model': body['model'] + '-2026', 'content': [], 'stop_reason': None, 'stop_sequence': None, 'usage': {'input_tokens': n, 'output_tokens': 1}})
    yield event('content_block_start', index=0, content_block={'type': 'text', 'text': ''})
    yield event('ping')
    yield from (event('content_block_delta', index=0, delta={'type': 'text_delta', 'text': p}) for p in pieces(s.text))
    if s.error: yield event('error', error={'type': s.error, 'message': s.error}); return
    yield event('content_block_stop', index=0)
    yield event('message_delta', delta={'stop_reason': {'stop': 'end_turn', 'length': 'max_tokens'}.get(s.finish, s.finish), 'stop_sequence': None}, usage={'output_tokens': m})
    yield event('message_stop')

@contextmanager
def provider_server(script=None):
    "A server for the length of a `with` block."
    server = ProviderServer(script)
    try: yield server
    finally: server.stop()
