"""Providers through their own clients against a server on loopback: every way to fail is told by name, one layer tries again, and keys stay where they are."""
import asyncio, io, json, logging, pickle, time, traceback
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given, settings, strategies as st
from provider_server import Step, openai_reply, anthropic_reply, provider_server

from stateset_nb import agents
from stateset_nb.agents import (Agent, AgentConfig, Answer, AnthropicBackend, Budget, BudgetExceeded, CircuitBreaker, CircuitOpen, FallbackBackend, OpenAIBackend, ProviderError, RetryWithBackoff,
                                ServerPolicy, StubBackend, ToolAgent, worth_retrying, _anthropic_answer, _anthropic_talk, _checked, _loose, _openai_answer, _retry_after, _strict, _with_ids)
from stateset_nb.core import BackendError, ConfigError, DataError, Message, MissingDependency, ToolCall
from stateset_nb.policy import SamplingParams

pytest.importorskip('openai'); pytest.importorskip('anthropic'); pytest.importorskip('stamina')

KINDS = ('openai', 'anthropic')
HELLO = [Message('system', 'Be kind.'), Message('user', 'Hello?')]
SCORE = {'type': 'object', 'properties': {'score': {'type': 'number', 'minimum': 0, 'maximum': 1}, 'why': {'type': 'string'}}, 'required': ['score', 'why'], 'additionalProperties': False}
GOOD = '{"score": 0.8, "why": "kind"}'
CANARY = 'sk-canary-7f3a91'
each_kind = pytest.mark.parametrize('kind', KINDS)

def quick(**kw): return RetryWithBackoff(**dict(base_delay=.001, max_delay=.01, jitter=0) | kw)

def backend(kind, server, **kw):
    kw = dict(retry=quick(), timeout=5) | kw
    return OpenAIBackend('m', server.url, **kw) if kind == 'openai' else AnthropicBackend('m', server.root, **kw)

def soon(waiting): return asyncio.run(asyncio.wait_for(waiting, 20))

async def used(b, waiting):
    "What came of it, with the client closed."
    try: return await waiting
    finally: await b.close()

def ask(b, **kw): return soon(used(b, b.ask(HELLO, **kw)))

# ---- one layer tries again

@each_kind
def test_a_question_is_answered(kind):
    with provider_server([Step('Good day.')]) as s:
        a = ask(backend(kind, s))
        assert (a.text, a.data, a.model, a.usage, a.finish_reason, a.metadata['attempts']) == ('Good day.', None, 'm-2026', {'input_tokens': 7, 'output_tokens': 3}, 'stop', 1)
        assert s.paths == ['/v1/chat/completions' if kind == 'openai' else '/v1/messages'] and 'Be kind.' in json.dumps(s.asked[0])

@each_kind
@pytest.mark.parametrize('status', [408, 409, 429, 500, 502, 503, 529])
def test_what_passes_is_tried_again(kind, status):
    with provider_server([Step(status=status), Step(status=status), Step('At last.')]) as s:
        a = ask(backend(kind, s))
        assert (a.text, a.metadata['attempts'], len(s.asked)) == ('At last.', 3, 3)

@each_kind
@pytest.mark.parametrize('status', [400, 401, 402, 403, 404, 413, 422])
def test_what_does_not_pass_is_asked_once(kind, status):
    with provider_server([Step(status=status)]) as s:
        with pytest.raises(ProviderError, match=f'status {status}.*no, thank you') as e: ask(backend(kind, s))
        assert e.value.status == status and len(s.asked) == 1

@each_kind
def test_attempts_are_counted_once_over_all_layers(kind):
    with provider_server([Step(status=500)]) as s:
        with pytest.raises(ProviderError, match='status 500') as e: ask(backend(kind, s, retry=quick(max_attempts=3)))
        assert len(s.asked) == 3 and 'after 3 attempts' in e.value.__notes__[0]
    with provider_server([Step(status=500)]) as s:
        with pytest.raises(ProviderError): ask(backend(kind, s, retry=None))
        assert len(s.asked) == 1

@each_kind
@pytest.mark.parametrize('as_date', [False, True])
def test_retry_after_is_honoured(kind, as_date, caplog):
    "Seen in the log, with no waiting."
    import stamina
    then = datetime(2026, 10, 21, 7, 28, tzinfo=timezone.utc)   # the server's clock is not ours
    headers = {'Retry-After': format_datetime(then + timedelta(seconds=7), usegmt=True), 'Date': format_datetime(then, usegmt=True)} if as_date else {'Retry-After': '7'}
    with provider_server([Step(status=429, headers=headers), Step()]) as s, stamina.set_testing(True, attempts=4):
        ask(backend(kind, s, retry=quick(base_delay=0)))
        assert len(s.asked) == 2 and 'attempt 1 of 4 failed (ProviderError 429), again in 7.00 s' in caplog.text and 'stamina' not in caplog.text

def test_it_is_really_waited():
    with provider_server([Step(status=429, headers={'retry-after-ms': '120'}), Step()]) as s:
        began = time.monotonic()
        ask(backend('openai', s, retry=quick(base_delay=0)))
        assert .12 <= time.monotonic() - began < 5

@each_kind
def test_a_wait_past_the_deadline_is_not_begun(kind):
    with provider_server([Step(status=429, headers={'Retry-After': '3600'})]) as s:
        began = time.monotonic()
        with pytest.raises(ProviderError, match='status 429') as e: ask(backend(kind, s, retry=quick(deadline=5)))
        assert e.value.retry_after == 3600 and len(s.asked) == 1 and time.monotonic() - began < 4

@each_kind
def test_the_deadline_cuts_an_attempt_off(kind):
    with provider_server([Step(delay=9)]) as s:
        with pytest.raises(BackendError, match='no answer within 0.2 s and 1 attempts'): ask(backend(kind, s, retry=quick(deadline=.2)))

@each_kind
def test_a_slow_answer_is_taken_back_and_asked_for_again(kind):
    with provider_server([Step(delay=9), Step('Now.')]) as s:
        assert ask(backend(kind, s, timeout=.15)).text == 'Now.'
        assert s.dropped == 1
    with provider_server([Step(delay=9)]) as s:
        with pytest.raises(ProviderError, match='has not answered within 0.05 s'): ask(backend(kind, s, timeout=.05, retry=None))

@each_kind
@pytest.mark.parametrize('body,match', [(b'{"choices": [{"mess', 'not JSON.*cut off'), (b'', 'not JSON'), (b'<html>Log in</html>', 'not JSON'), (b'\xff\xfe', 'not JSON'), (b'[' * 50_000, 'not JSON')], ids=['cut', 'empty', 'page', 'bytes', 'deep'])
def test_what_is_not_json_is_told_and_tried_again(kind, body, match):
    with provider_server([Step(body=body)]) as s:
        with pytest.raises(ProviderError, match=match): ask(backend(kind, s, retry=quick(max_attempts=2)))
        assert len(s.asked) == 2

@each_kind
@pytest.mark.parametrize('cut', [0, 40])
def test_a_cut_line_is_told_and_tried_again(kind, cut):
    with provider_server([Step(cut=cut), Step('Whole.')]) as s: assert ask(backend(kind, s)).text == 'Whole.'
    with provider_server([Step(cut=cut)]) as s:
        with pytest.raises(ProviderError, match='broke off|cannot be reached') as e: ask(backend(kind, s, retry=None))
        assert e.value.again

@each_kind
def test_nobody_there(kind):
    with provider_server() as s: pass
    with pytest.raises(ProviderError, match='cannot be reached.*is the server up'): ask(backend(kind, s, retry=quick(max_attempts=2)))

@each_kind
def test_a_redirect_is_not_followed(kind):
    with provider_server() as other, provider_server([Step(status=307, headers={'Location': other.url + '/chat/completions'})]) as s:
        with pytest.raises(ProviderError, match='status 307.*redirects are not followed'): ask(backend(kind, s))
        assert not other.asked and len(s.asked) == 1

# ---- fields

@each_kind
@pytest.mark.parametrize('structured', ['format', 'tool'])
def test_fields_come_by_the_providers_own_way(kind, structured):
    if (kind, structured) == ('openai', 'tool'): pytest.skip('OpenAI has one way')
    with provider_server([Step(GOOD)]) as s:
        a = ask(backend(kind, s, **({'structured': structured} if kind == 'anthropic' else {})), schema=SCORE)
        assert a.data == {'score': .8, 'why': 'kind'} and json.loads(a.text) == a.data and not a.tool_calls
        b = s.asked[0]
        if kind == 'openai': assert b['response_format'] == {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': SCORE, 'strict': True}}
        elif structured == 'tool': assert b['tool_choice'] == {'type': 'tool', 'name': 'answer'} and b['tools'][0]['input_schema'] == SCORE
        else: assert b['output_config']['format']['schema']['properties']['score'] == {'type': 'number', 'description': '(minimum 0, maximum 1)'}

BAD = {'another field': ('{"scor": 0.8, "why": ""}', "'scor' was unexpected|'score' is a required"), 'out of range': ('{"score": 8, "why": ""}', 'score: 8 is greater'), 'text': ('{"score": "0.8", "why": ""}', "'0.8' is not of type"),
       'not JSON': ('I would say 0.8', 'not JSON'), 'NaN': ('{"score": NaN, "why": ""}', 'NaN is no JSON'), 'a list': ('[0.8]', 'is not of type'), 'nothing': ('', 'not JSON')}

@each_kind
@pytest.mark.parametrize('what', BAD)
def test_wrong_fields_are_an_error_and_not_a_default(kind, what):
    text, match = BAD[what]
    with provider_server([Step(text)]) as s:
        with pytest.raises(BackendError, match=match): ask(backend(kind, s), schema=SCORE)
        assert len(s.asked) == 1, 'it was answered, and paid for'

@each_kind
def test_a_cut_off_reply(kind):
    with provider_server([Step('{"score": 0.', finish='length')]) as s:
        with pytest.raises(BackendError, match='cut off after.*raise max_tokens'): ask(backend(kind, s), schema=SCORE)
        assert ask(backend(kind, s)).finish_reason == 'length'

@each_kind
def test_a_refusal_has_no_fields(kind):
    body = openai_reply({'model': 'm'}, Step('')) if kind == 'openai' else anthropic_reply({'model': 'm'}, Step('I cannot.', finish='refusal'))
    if kind == 'openai': body['choices'][0]['message'] = {'role': 'assistant', 'content': None, 'refusal': 'I cannot.'}
    with provider_server([Step(body=body)]) as s:
        with pytest.raises(BackendError, match="declined: 'I cannot.'"): ask(backend(kind, s), schema=SCORE)
        assert ask(backend(kind, s)).text == 'I cannot.'

@pytest.mark.parametrize('schema,match', [({'type': 'array'}, 'put the value into a field'), ({'type': 'object', 'required': 'x'}, 'no JSON schema')])
def test_a_wrong_schema_is_refused_before_anything_is_sent(schema, match):
    with provider_server() as s:
        with pytest.raises(ConfigError, match=match): ask(backend('openai', s), schema=schema)
        assert not s.asked

JSON = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(
    ['choices', 'message', 'content', 'finish_reason', 'type', 'text', 'usage', 'stop_reason', 'tool_calls', 'input', 'name', 'id']), v, max_size=4), max_leaves=10)

@settings(max_examples=300)
@given(st.data())
def test_any_reply_is_an_answer_or_an_error_of_ours(data):
    "Whatever JSON a server sends."
    kind = data.draw(st.sampled_from(KINDS))
    reply = (openai_reply if kind == 'openai' else anthropic_reply)({'model': 'm'}, Step('Hi', calls=(('f', {}),)))
    path = data.draw(st.sampled_from([(), ('usage',), ('choices',), ('choices', 0), ('choices', 0, 'message'), ('choices', 0, 'message', 'tool_calls'), ('content',), ('content', 0), ('content', 1), ('stop_reason',)]))
    whole = {'r': reply}
    at, key = whole, 'r'
    for k in path:
        if k not in (at[key] if isinstance(at[key], dict) else range(len(at[key]))): break
        at, key = at[key], k
    at[key] = data.draw(JSON)
    read, count = (_openai_answer, agents._openai_usage) if kind == 'openai' else (_anthropic_answer, agents._anthropic_usage)
    try: a = read(whole['r'], 'm')
    except BackendError: pass
    else: assert isinstance(a.text, str) and a.finish_reason in ('stop', 'length')
    assert count(whole['r']).keys() <= {'input_tokens', 'output_tokens'}

# ---- talks and tools

def look_up_order(order_id: str) -> str:
    "Look an order up."
    return f'{order_id}: delivered'

@each_kind
def test_an_agent_talks(kind):
    with provider_server([Step('Which order is it?')]) as s:
        b = backend(kind, s)
        async def go():
            r = await Agent(AgentConfig('m', system_prompt='Be brief.', temperature=.5, max_new_tokens=99), b).respond('Hello?')
            await b.close()
            return r
        r = soon(go())
        assert (r.message.text, r.finish_reason, r.ids, r.metadata['model'], r.metadata['usage']['output_tokens']) == ('Which order is it?', 'stop', (), 'm-2026', 3)
        d = s.asked[0]
        assert d['max_tokens'] == 99 and d['temperature'] == .5 and ('Be brief.' == d['system'] if kind == 'anthropic' else d['messages'][0] == {'role': 'system', 'content': 'Be brief.'})

@each_kind
def test_an_agent_uses_tools(kind):
    with provider_server([Step(calls=(('look_up_order', {'order_id': '4712'}), ('look_up_order', {'order': 1}))), Step('It was delivered.')]) as s:
        b = backend(kind, s)
        desk = ToolAgent(AgentConfig('m'), [look_up_order], b)
        assert soon(used(b, desk.say('Where is 4712?'))) == 'It was delivered.'
        assert [m.role for m in desk.messages] == ['user', 'assistant', 'tool', 'tool', 'assistant']
        second = json.dumps(s.asked[1])
        assert '4712: delivered' in second and 'Field required' in second
        if kind == 'anthropic': assert [m['role'] for m in s.asked[1]['messages']] == ['user', 'assistant', 'user'] and [x['type'] for x in s.asked[1]['messages'][2]['content']] == ['tool_result'] * 2
        else: assert [m.get('tool_call_id') for m in s.asked[1]['messages']][2:] == ['c0', 'c1']

def test_keys_of_a_log_do_not_reach_a_provider():
    m = Message.from_dict({'role': 'user', 'content': 'Hi', 'internal_note': 'difficult customer'})
    with provider_server() as s:
        b = backend('openai', s)
        soon(used(b, b.ask([m])))
        assert 'difficult' not in json.dumps(s.asked[0])

def test_openai_itself_gets_its_own_words():
    body = agents._openai_request(HELLO, None, None, SamplingParams(64), True)
    assert body['max_completion_tokens'] == 64 and not {'temperature', 'top_p', 'max_tokens'} & set(body)
    with pytest.raises(ConfigError, match='top_k=3'): agents._openai_request(HELLO, None, None, SamplingParams(64, top_k=3), True)
    assert agents._openai_request(HELLO, None, None, SamplingParams(64, top_k=3), False)['extra_body'] == {'top_k': 3}

roles = st.sampled_from(['user', 'assistant', 'system'])
@given(st.lists(st.tuples(roles, st.text(max_size=5), st.integers(0, 2)), min_size=1, max_size=8))
def test_any_talk_alternates_at_anthropic(turns):
    talk = []
    for role, text, calls in turns:
        talk.append(Message(role, text, tuple(ToolCall('f') for _ in range(calls)) if role == 'assistant' else ()))
        talk += [Message('tool', 'done')] * (calls if role == 'assistant' else 0)
    _, sent = _anthropic_talk(talk)
    assert all(a['role'] != b['role'] for a, b in zip(sent, sent[1:])) and all(t['content'] for t in sent)
    asked = [b['id'] for t in sent for b in t['content'] if b['type'] == 'tool_use']
    told = [b['tool_use_id'] for t in sent for b in t['content'] if b['type'] == 'tool_result']
    assert asked == told and len(set(asked)) == len(asked)
    assert [m.tool_call_id for m in _with_ids(talk) if m.role == 'tool'] == told

def test_a_schema_is_loosened_and_closed():
    s = {'type': 'object', 'properties': {'minimum': {'type': 'integer', 'minimum': 1}, 'tags': {'type': 'array', 'items': {'type': 'object', 'properties': {}}, 'maxItems': 3}, 'kind': {'enum': ['a', {'minimum': 3}]}}, 'required': ['minimum']}
    out = _loose(s)
    assert out['additionalProperties'] is False and out['properties']['tags']['items']['additionalProperties'] is False and set(out['properties']) == {'minimum', 'tags', 'kind'}
    assert out['properties']['minimum'] == {'type': 'integer', 'description': '(minimum 1)'} and out['properties']['kind'] == {'enum': ['a', {'minimum': 3}]}
    assert not _strict(s) and _strict(SCORE)

# ---- streams

async def read(stream):
    got = []
    async for piece in stream: got.append(piece)
    return got, stream.answer

@each_kind
def test_a_stream(kind):
    with provider_server([Step('Your lamp was delivered.')]) as s:
        b = backend(kind, s, budget=(budget := Budget(tokens=10_000)))
        got, a = soon(used(b, read(b.stream(HELLO))))
        assert len(got) > 3 and ''.join(got) == a.text == 'Your lamp was delivered.'
        assert (a.model, a.usage, a.finish_reason) == ('m-2026', {'input_tokens': 7, 'output_tokens': 3}, 'stop') and budget.tokens_used == 10

@each_kind
@pytest.mark.parametrize('how', ['cut', 'error', 'slow', 'unfinished'])
def test_a_cut_stream_gives_what_came(kind, how):
    text = 'Your lamp was delivered.'
    step = {'cut': Step(text, cut=5), 'error': Step(text, error='overloaded_error'), 'slow': Step(text, delay=.2), 'unfinished': Step(text, finish=None)}[how]
    with provider_server([step]) as s:
        b = backend(kind, s, timeout=.1 if how == 'slow' else 5, retry=None)
        with pytest.raises(ProviderError) as e: soon(used(b, read(b.stream(HELLO))))
        assert text.startswith(e.value.said) and (e.value.said or how == 'slow') and len(s.asked) == 1
        if how in ('error', 'unfinished'): assert e.value.said == text

@each_kind
def test_the_opening_of_a_stream_is_tried_again(kind):
    with provider_server([Step(status=503), Step('Hello.')]) as s:
        b = backend(kind, s)
        assert ''.join(soon(used(b, read(b.stream(HELLO))))[0]) == 'Hello.' and len(s.asked) == 2

@each_kind
def test_a_stream_that_is_left_closes_its_line(kind):
    with provider_server([Step('word ' * 400, delay=.01)]) as s:
        b = backend(kind, s)
        async def go():
            stream = b.stream(HELLO)
            first = await anext(stream)
            await stream.aclose()
            return first
        assert soon(used(b, go())) and gone(s)

def gone(s):
    "Is nothing in flight at the server, soon?"
    for _ in range(200):
        if not s.open: return True
        time.sleep(.01)
    return False

# ---- breaker, cancellation, limits

@each_kind
def test_fifty_at_once_meet_an_open_circuit(kind):
    now = [0.]
    with provider_server([Step(status=500)]) as s:
        breaker = CircuitBreaker(3, 30, clock=lambda: now[0])
        b = backend(kind, s, retry=None, breaker=breaker)
        async def kinds(n): return [type(x).__name__ for x in await asyncio.gather(*(b.ask(HELLO) for _ in range(n)), return_exceptions=True)]
        async def go():
            try:
                for _ in range(3): await kinds(1)
                assert breaker.state == 'open' and len(s.asked) == 3
                assert await kinds(50) == ['CircuitOpen'] * 50 and len(s.asked) == 3
                now[0] = 31
                assert sorted(await kinds(50)) == ['CircuitOpen'] * 49 + ['ProviderError'] and len(s.asked) == 4 and breaker.state == 'open'
                now[0], s.script = 62, [Step()]
                assert sorted(await kinds(50)) == ['Answer'] + ['CircuitOpen'] * 49 and breaker.state == 'closed'
                assert await kinds(5) == ['Answer'] * 5
            finally: await b.close()
        soon(go())

@each_kind
@pytest.mark.parametrize('status', [400, 401, 429])
def test_a_refused_request_opens_no_circuit(kind, status):
    with provider_server([Step(status=status)]) as s:
        breaker = CircuitBreaker(1)
        with pytest.raises(ProviderError): ask(backend(kind, s, retry=None, breaker=breaker))
        assert breaker.state == 'closed'

@each_kind
def test_cancellation_leaves_nothing_in_flight(kind):
    with provider_server([Step(delay=30)]) as s:
        breaker, budget = CircuitBreaker(1), Budget(tokens=100_000)
        b = backend(kind, s, timeout=60, breaker=breaker, budget=budget, limit=20)
        async def go():
            before = asyncio.all_tasks()
            tasks = [asyncio.ensure_future(b.ask(HELLO)) for _ in range(30)]
            while s.open < 20: await asyncio.sleep(.01)
            for t in tasks: t.cancel()
            res = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(r, asyncio.CancelledError) for r in res)
            for _ in range(200):
                if not s.open: break
                await asyncio.sleep(.01)
            assert s.dropped == 20 and not s.open and len(s.asked) == 20
            await b.close()
            assert asyncio.all_tasks() == before
        soon(go())
        assert breaker.state == 'closed' and breaker.failures == 0 and budget._tokens_held == 0 and budget.calls == 20

def test_a_cancelled_probe_lets_the_next_one_try():
    now = [0.]
    br = CircuitBreaker(1, 10, clock=lambda: now[0])
    async def fail(): raise ConnectionError
    async def hang(): await asyncio.sleep(60)
    async def fine(): return 11
    async def go():
        with pytest.raises(ConnectionError): await br.call(fail)
        now[0] = 11
        t = asyncio.ensure_future(br.call(hang)); await asyncio.sleep(0)
        assert br.state == 'half-open'
        with pytest.raises(CircuitOpen, match='half-open'): await br.call(fine)
        t.cancel(); await asyncio.gather(t, return_exceptions=True)
        assert br.state == 'open' and await br.call(fine) == 11 and br.state == 'closed'
    soon(go())

def test_a_call_from_before_has_no_say():
    "One that began while the circuit was closed, and fails when it is closed again, does not count twice; a late success does not close it."
    now = [0.]
    br, gate = CircuitBreaker(1, 10, clock=lambda: now[0]), []
    async def late(ok):
        f = asyncio.get_running_loop().create_future(); gate.append(f)
        await f
        if not ok: raise ConnectionError
    async def fail(): raise ConnectionError
    async def go():
        old = [asyncio.ensure_future(br.call(late, ok)) for ok in (True, False)]; await asyncio.sleep(0)
        with pytest.raises(ConnectionError): await br.call(fail)
        gate[0].set_result(None); await old[0]
        assert br.state == 'open'
        now[0] = 11
        probe = asyncio.ensure_future(br.call(late, True)); await asyncio.sleep(0)
        gate[1].set_result(None); await asyncio.gather(old[1], return_exceptions=True)
        assert br.state == 'half-open'
        gate[2].set_result(None); await probe
        assert br.state == 'closed' and br.failures == 0
    soon(go())

@each_kind
def test_no_more_in_flight_than_the_limit(kind):
    with provider_server([Step(delay=.02)]) as s:
        b = backend(kind, s, limit=3)
        async def go(): return await asyncio.gather(*(b.ask(HELLO) for _ in range(12)))
        assert len(soon(used(b, go()))) == 12 and s.most <= 3

# ---- budgets

@each_kind
def test_fifty_at_once_do_not_pass_the_budget(kind):
    with provider_server([Step(usage=(60, 40), delay=.01)]) as s:
        budget = Budget(tokens=1500)
        b = backend(kind, s, budget=budget, limit=50)
        async def go(): return await asyncio.gather(*(b.ask(HELLO, params=SamplingParams(100)) for _ in range(50)), return_exceptions=True)
        res = soon(used(b, go()))
        served = [r for r in res if isinstance(r, Answer)]
        assert all(isinstance(r, (Answer, BudgetExceeded)) for r in res)
        assert len(served) == len(s.asked) == budget.calls and budget.tokens_used == 100 * len(served) <= 1500 and len(served) >= 10

@each_kind
def test_money(kind):
    with provider_server([Step(usage=(1000, 500))]) as s:
        budget = Budget(usd=.0145, prices={'m': (2, 8)})
        b = backend(kind, s, budget=budget)
        async def go():
            a = await b.ask(HELLO, params=SamplingParams(500))
            assert a.cost_usd == pytest.approx(.006) == budget.usd_used
            await b.ask(HELLO, params=SamplingParams(500))
            with pytest.raises(BudgetExceeded, match='usd, and 0.012 of 0.0145 are used'): await b.ask(HELLO, params=SamplingParams(500))
        soon(used(b, go()))
        assert len(s.asked) == 2

@each_kind
def test_an_unknown_price_is_an_error_where_money_counts(kind):
    with provider_server() as s:
        with pytest.raises(ConfigError, match="no price is known for 'm'"): ask(backend(kind, s, budget=Budget(usd=1, prices={'other': (1, 1)})))
        assert not s.asked
        assert ask(backend(kind, s, budget=Budget(tokens=10_000))).cost_usd is None

@each_kind
@pytest.mark.parametrize('step,counted', [(Step(status=400), 'none'), (Step(usage=None), 'all'), (Step(delay=9), 'all'), (Step(body=b'{'), 'all')], ids=['refused', 'not told', 'taken back', 'broken'])
def test_what_is_not_known_counts_in_full(kind, step, counted):
    with provider_server([step]) as s:
        budget = Budget(tokens=10_000)
        try: ask(backend(kind, s, budget=budget, retry=None, timeout=.2), params=SamplingParams(500))
        except BackendError: pass
        assert (budget.tokens_used == 0) if counted == 'none' else (budget.tokens_used > 500) and budget._tokens_held == 0

@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=30), st.integers(0, 400))
def test_a_budget_is_never_passed(calls, limit):
    async def go():
        b, most = Budget(tokens=limit), 0
        async def one(c):
            nonlocal most
            try:
                async with b.hold('m', c[0], c[1]) as h:
                    most = max(most, b.tokens_used + b._tokens_held)
                    await asyncio.sleep(0)
                    h.used = (c[0], int(c[1] * c[2]))
            except BudgetExceeded: return
        await asyncio.gather(*map(one, calls))
        assert b.tokens_used <= limit and most <= limit and b._tokens_held == 0 and not b._waiting
    soon(go())

# ---- chains

@each_kind
def test_a_chain_says_what_it_did(kind, caplog):
    with provider_server([Step(status=500)]) as down, provider_server([Step(GOOD)]) as up:
        chain = FallbackBackend([backend(kind, down, retry=None), backend('anthropic', up), StubBackend(['never'])])
        async def go():
            a, r = await chain.ask(HELLO, schema=SCORE), await chain.reply(HELLO, None, SamplingParams())
            for b in chain.backends[:2]: await b.close()
            return a, r
        with caplog.at_level(logging.WARNING): a, r = soon(go())
        assert a.data['score'] == .8 and len(a.metadata['fallback']) == 1 and 'status 500' in a.metadata['fallback'][0]['error'] and a.metadata['answered_by'] == repr(chain.backends[1]) and 'm at 127.0.0.1' in repr(chain.backends[1])
        assert r.message.text == GOOD and r.metadata['fallback'] == a.metadata['fallback']
        assert 'asking AnthropicBackend' in caplog.text and len(up.asked) == 2

def test_a_chain_of_which_all_fail_names_each():
    with provider_server([Step(status=500)]) as s:
        chain = FallbackBackend([backend('openai', s, retry=None), StubBackend(['no JSON'])])
        with pytest.raises(BackendError, match="2 of 2 backends failed.*OpenAIBackend.*status 500.*the stub said 'no JSON'"): soon(chain.ask(HELLO, schema=SCORE))
    with pytest.raises(ConfigError): FallbackBackend([])

def test_a_first_answer_says_nothing_of_a_chain(): assert 'fallback' not in soon(FallbackBackend([StubBackend(['Hi'])]).ask(HELLO)).metadata

def test_an_open_circuit_leads_on():
    with provider_server([Step(status=500)]) as s:
        b = backend('openai', s, retry=quick(), breaker=CircuitBreaker(1))
        chain = FallbackBackend([b, StubBackend(['Hi'])])
        async def go(): return [await chain.ask(HELLO) for _ in range(3)]
        res = soon(used(b, go()))
        assert [r.text for r in res] == ['Hi'] * 3 and len(s.asked) == 1 and 'CircuitOpen: the circuit of' in res[-1].metadata['fallback'][0]['error']

def test_a_missing_key_is_no_reason_to_ask_another(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(ConfigError, match='OPENAI_API_KEY is not set'): soon(FallbackBackend([OpenAIBackend('gpt-x'), StubBackend(['Hi'])]).ask(HELLO))

# ---- the two old names alone

def test_retries_of_any_function():
    calls = []
    @quick(on=(ValueError,), max_attempts=3)
    async def f(x, *, y):
        "Says x and y."
        calls.append((x, y))
        if len(calls) < 3: raise ValueError('no')
        return x + y
    assert soon(f(1, y=2)) == 3 and calls == [(1, 2)] * 3 and f.__doc__ == 'Says x and y.'
    async def g(): raise KeyError('x')
    with pytest.raises(KeyError): soon(quick().call(g))

def test_own_timeouts_are_tried_again_and_raised_as_they_are():
    n = []
    async def f(): n.append(1); raise TimeoutError('mine')
    with pytest.raises(TimeoutError, match='mine'): soon(quick(max_attempts=3, deadline=5).call(f))
    assert len(n) == 3

def test_cancellation_is_not_tried_again():
    n = []
    async def f(): n.append(1); await asyncio.sleep(60)
    async def go():
        t = asyncio.ensure_future(quick().call(f)); await asyncio.sleep(.01); t.cancel()
        with pytest.raises(asyncio.CancelledError): await t
    soon(go())
    assert n == [1]

def test_stamina_in_testing_does_not_wait():
    import stamina
    n = []
    async def f(): n.append(1); raise ConnectionError
    with stamina.set_testing(True, attempts=3), pytest.raises(ConnectionError): soon(RetryWithBackoff(max_attempts=9, base_delay=60, deadline=None).call(f))
    assert len(n) == 3

def test_same_seed_same_waits():
    waits = lambda seed: [RetryWithBackoff(seed=seed).wait(k, TimeoutError()) for k in range(1, 6)]
    assert waits(3) == waits(3) != waits(4)

@given(st.integers(1, 200), st.floats(0, 10), st.floats(0, 60), st.floats(0, 1), st.integers(0, 9))
def test_a_wait_is_bounded(attempt, base, longest, jitter, seed):
    assert 0 <= RetryWithBackoff(base_delay=base, max_delay=longest, jitter=jitter, seed=seed).wait(attempt, TimeoutError()) <= longest

@pytest.mark.parametrize('kw', [dict(max_attempts=0), dict(base_delay=-1), dict(deadline=0), dict(jitter=2)])
def test_impossible_retries(kw):
    with pytest.raises(ConfigError): RetryWithBackoff(**kw)

@given(st.text(max_size=30))
def test_any_retry_after_is_seconds_or_nothing(text):
    s = _retry_after({'retry-after': text})
    assert s is None or 0 <= s < float('inf')

@pytest.mark.parametrize('kind', KINDS)
def test_errors_of_a_client_used_alone_are_known(kind):
    "A function of the user's own that calls the client."
    with provider_server([Step(status=429, headers={'Retry-After': '0.01'}), Step()]) as s:
        async def talk():
            import anthropic, openai
            c = openai.AsyncOpenAI(base_url=s.url, api_key='x', max_retries=0) if kind == 'openai' else anthropic.AsyncAnthropic(base_url=s.root, api_key='x', max_retries=0)
            try:
                m = [{'role': 'user', 'content': 'Hi'}]
                return await (c.chat.completions.create(model='m', messages=m) if kind == 'openai' else c.messages.create(model='m', messages=m, max_tokens=9))
            finally: await c.close()
        assert soon(quick().call(talk)).model == 'm-2026' and len(s.asked) == 2

def test_a_breaker_alone():
    br = CircuitBreaker(2, name='the desk')
    @br
    async def f(): raise OSError('x')
    async def go():
        for _ in range(2):
            with pytest.raises(OSError): await f()
        with pytest.raises(CircuitOpen, match='the circuit of the desk is open — it tries again in 30 s'): await f()
    soon(go())

# ---- a policy on a server takes the same two

def test_a_server_policy_tries_again_and_stops():
    class Format: end_ids = (1,)
    with provider_server([Step(status=503)]) as s:
        br = CircuitBreaker(3)
        p = ServerPolicy(s.url, 'm', Format(), max_context=99, retry=quick(max_attempts=3), breaker=br)
        async def go():
            with pytest.raises(ProviderError, match='status 503'): await p.sample([5], SamplingParams(4))
            with pytest.raises(CircuitOpen): await p.sample([5], SamplingParams(4))
            await p.close()
        soon(go())
        assert len(s.asked) == 3

# ---- keys

@each_kind
def test_a_key_is_never_shown(kind, monkeypatch):
    "Not in errors with their causes and tracebacks, reprs, pickles, metadata or any log, even where the server repeats it."
    monkeypatch.setenv('CANARY_KEY', CANARY)
    log, shown = io.StringIO(), []
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    old = root.level
    root.addHandler(handler); root.setLevel(logging.DEBUG)
    echo = {'error': {'type': 'authentication_error', 'message': f'wrong key: {CANARY}'}}
    try:
        for step in (Step(status=401, body=echo), Step(status=500, body=echo), Step(body=f'key {CANARY}'.encode()), Step(body={'key': CANARY}), Step(body={'choices': [{'finish_reason': CANARY, 'message': {}}], 'content': [], 'stop_reason': CANARY}), Step(cut=3), Step(delay=1), Step('Hi'), Step('x', error=CANARY)):
            with provider_server([step]) as s:
                b = backend(kind, s, api_key_env='CANARY_KEY', timeout=.15, retry=quick(max_attempts=2))
                for f in (lambda b=b: b.ask(HELLO), lambda b=b: read(b.stream(HELLO)), lambda b=b: FallbackBackend([b]).ask(HELLO)):
                    try: shown.append(repr(soon(used(b, f()))))
                    except BackendError as e: shown += [''.join(traceback.format_exception(e)), repr(e.__cause__), repr(e.__context__), repr(e.args), repr(vars(e))]
                shown += [repr(b), repr(vars(b)), repr(pickle.dumps(b))]
                assert any(CANARY in h for h in s.heads), 'the key did go to the provider'
    finally:
        root.removeHandler(handler); root.setLevel(old)
    assert CANARY not in log.getvalue() and not [x for x in shown if CANARY in x] and 'again in' in log.getvalue()

def test_our_log_holds_nothing_that_was_said(caplog):
    with provider_server([Step(status=500, body={'error': {'message': 'about SECRET-TALK'}}), Step(status=500)]) as s:
        with caplog.at_level(logging.INFO), pytest.raises(ProviderError): ask(backend('openai', s), params=SamplingParams(9))
        assert 'SECRET-TALK' not in caplog.text + str([r.__dict__ for r in caplog.records]) and 'Be kind' not in str([r.__dict__ for r in caplog.records])
        assert [r.getMessage() for r in caplog.records if r.name == 'stateset_nb.agents'][0].startswith('attempt 1 of 4 failed (ProviderError 500), again in')

def test_openais_key_goes_to_openai_alone(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', CANARY)
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://elsewhere/v1')
    with provider_server() as s:
        ask(backend('openai', s))
        assert not any(CANARY in h for h in s.heads)
    assert OpenAIBackend('m').base_url == 'https://api.openai.com/v1'

# ---- settings

@pytest.mark.parametrize('make', [lambda: OpenAIBackend(''), lambda: OpenAIBackend('m', 'localhost:8000'), lambda: OpenAIBackend('m', 'http://me:pw@host/v1'), lambda: AnthropicBackend('m', limit=0), lambda: OpenAIBackend('m', timeout=0),
                                  lambda: Budget(usd=-1), lambda: Budget(prices={'m': (1,)}), lambda: Budget(tokens=float('nan')), lambda: CircuitBreaker(0), lambda: CircuitBreaker(recovery_timeout=-1)])
def test_impossible_settings(make):
    with pytest.raises(ConfigError) as e: make()
    assert 'pw' not in str(e.value)

@each_kind
def test_a_backend_is_picklable(kind):
    with provider_server() as s:
        b = backend(kind, s, breaker=CircuitBreaker(), budget=Budget(tokens=9_000))
        ask(b)
        c = pickle.loads(pickle.dumps(b))
        assert ask(c).text == 'Hello.' and c.budget.tokens_used == 20

@pytest.mark.parametrize('name,make', [('openai', lambda: OpenAIBackend('m')), ('anthropic', lambda: AnthropicBackend('m')), ('stamina', lambda: soon(RetryWithBackoff().call(asyncio.sleep, 0))), ('jsonschema', lambda: _checked(Answer('{}'), SCORE, 'm'))])
def test_a_missing_package_is_named(monkeypatch, name, make):
    import sys
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=rf"{name} is not installed.*stateset-nb\[judge\]"): make()

def test_a_stub_is_asked():
    assert soon(StubBackend([GOOD]).ask(HELLO, schema=SCORE)).data == {'score': .8, 'why': 'kind'}
    with pytest.raises(BackendError, match='the stub said'): soon(StubBackend(['Fine.']).ask(HELLO, schema=SCORE))
    with pytest.raises(DataError, match='nobody called'): _with_ids([Message('tool', 'x')])
    assert worth_retrying(ConnectionResetError()) and not worth_retrying(ValueError())
