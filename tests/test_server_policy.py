"""A policy behind a real HTTP server on loopback, asked by the real client: what comes back is exact to the token, and whatever is not is refused by name."""
import asyncio, json, math, sys, time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import Recorder
from hypothesis import given, settings, strategies as st
from provider_server import LoopbackServer, content

from stateset_nb.agents import Agent, AgentConfig, MultiTurnAgent, PolicyBackend, ServerPolicy, _turn
from stateset_nb.core import BackendError, ConfigError, DataError, Message, MissingDependency, StateSetError, stream
from stateset_nb.environments import SupportDesk, desk_scenarios, rollout, rollouts, support_desk_logs
from stateset_nb.policy import ContextFull, Policy, SamplingParams, TemplateFormat, TinyConfig, _corpus, make_tokenizer, tiny_model, tiny_policy

pytest.importorskip('openai')
READS = 512

class Server(LoopbackServer):
    "OpenAI's completions as vLLM speaks them; one policy answers."
    def __init__(self, policy):
        self.policy, self.delay, self.status, self.raw, self.mode = policy, 0., 200, None, 'processed'
        self.twist = lambda reply: reply                                     # what is changed in a reply
        self.cards = [{'id': 'desk', 'max_model_len': READS}]
        super().__init__()

    async def completion(self, b):
        await asyncio.sleep(self.delay)
        p = SamplingParams(b['max_tokens'], b['temperature'], b['top_p'], b['top_k'], b['seed'])
        s, = await self.policy.sample(b['prompt'], p)
        logps = s.logps if self.mode == 'processed' else plain_logps(self.policy, [*b['prompt'], *s.ids], len(s.ids)).tolist()
        text = self.policy.tokenizer.decode([i for i in s.ids if i not in b['stop_token_ids']], skip_special_tokens=True)
        choice = {'index': 0, 'text': text, 'finish_reason': s.finish, 'stop_reason': None, 'prompt_token_ids': b['prompt'], 'token_ids': s.ids,
                  'logprobs': {'text_offset': [], 'tokens': [], 'top_logprobs': [], 'token_logprobs': logps}}
        return self.twist({'id': 'cmpl-1', 'object': 'text_completion', 'created': 0, 'model': b['model'], 'choices': [choice], 'usage': {}})

    async def answer(self, path, body):
        "(status, bytes)"
        if path == '/v1/models': return 200, json.dumps({'object': 'list', 'data': self.cards}).encode()
        self.asked.append(body)
        if self.status != 200: return self.status, b'{"error": {"message": "no, thank you", "type": "Refused"}}'
        if self.raw is not None: return 200, self.raw
        return 200, json.dumps(await self.completion(body)).encode()

    async def reply(self, writer, path, body):
        status, said = await self.answer(path, body)
        cut = self.raw == b'{"cut'
        writer.write(content(said, status, length=len(said) + cut))
        await writer.drain()
        return cut

def soon(awaitable, seconds=60):
    "Run, and fail rather than hang."
    async def go(): return await asyncio.wait_for(awaitable, seconds)
    return asyncio.run(go())

def plain_logps(policy, ids, n, temperature=1., top_k=0):
    "Log-probabilities of the last n tokens by one pass over everything."
    with torch.no_grad(): z = policy.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()[-n:] / temperature
    if top_k: z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
    return z.log_softmax(-1).gather(-1, torch.tensor(ids[-n:])[:, None])[:, 0].float()

@pytest.fixture(scope='module')
def policy(): return tiny_policy(support_desk_logs(80, 0), 0, TinyConfig(90, 8, short_first=.5, hidden_size=48, layers=1, max_tokens=READS), cache=False)

@contextmanager
def serving(policy):
    s = Server(policy)
    try: yield s
    finally: s.stop()

@pytest.fixture
def server(policy, monkeypatch):
    for k in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'http_proxy', 'https_proxy', 'all_proxy'): monkeypatch.delenv(k, raising=False)
    with serving(policy) as s: yield s

def served(server, **kw): return ServerPolicy(server.url, 'desk', server.policy.format, **{'timeout': 30} | kw)
def ask(policy, text='Where is order #4712?'): return policy.format.start([Message('user', text)])

async def used(p, work):
    "What `work` gives, the connections closed after it."
    try: return await work
    finally: await p.close()

# Exact

@pytest.mark.parametrize('how', [{}, {'temperature': .7}, {'temperature': 1.3, 'top_k': 5}, {'temperature': 0}], ids=str)
def test_log_probabilities_are_those_of_a_plain_pass(server, how):
    p, ids = served(server), ask(server.policy)
    turns = soon(used(p, p.sample(ids, SamplingParams(40, seed=7, **how), n=4)))
    assert [t.finish for t in turns] == ['stop' if t.ids[-1] in server.policy.format.end_ids else 'length' for t in turns]
    for t in turns:
        want = plain_logps(server.policy, [*ids, *t.ids], len(t.ids), how.get('temperature') or 1., how.get('top_k', 0))
        assert torch.allclose(want, torch.tensor(t.logps), atol=1e-5)
    mine = asyncio.run(server.policy.sample(ids, SamplingParams(40, seed=7, **how), n=4))
    assert [t.ids for t in turns] == [t.ids for t in mine], 'the i-th turn has the seed it has in a local policy'
    assert len({t.ids for t in turns}) > 1 or how.get('temperature') == 0

def test_a_request_names_everything_a_server_might_choose(server):
    p = served(server)
    soon(used(p, p.sample(ask(server.policy), SamplingParams(8, seed=2**62))))
    b, = server.asked
    assert b['prompt'] == list(ask(server.policy)) and b['seed'] == 2**62 and b['stop_token_ids'] == list(server.policy.format.end_ids)
    neutral = {'repetition_penalty': 1, 'presence_penalty': 0, 'frequency_penalty': 0, 'min_p': 0, 'top_p': 1, 'top_k': 0, 'temperature': 1, 'ignore_eos': True, 'return_token_ids': True, 'stream': False}
    assert {k: b[k] for k in neutral} == neutral

def check_tokens(policy, t):
    "Every sampled token of an episode has the log-probability of a plain pass, and the spans say what was said."
    assert t.error is None
    said = [m for m in t.messages if m.role == 'assistant']
    for s in t.segments:
        want = plain_logps(policy, s.ids, len(s.ids) - 1)
        got, mask = torch.tensor(s.logps[1:]), torch.tensor(s.mask[1:]).bool()
        assert torch.allclose(want[mask], got[mask], atol=1e-5) and not got[~mask].any()
        for a, b in s.turn_spans:
            m = policy.format.parse(s.ids[a:b])
            assert all(s.mask[a:b]) and (m.text, m.tool_calls) == (said[0].text, said[0].tool_calls)
            said.pop(0)
    assert not said

def test_rollouts_with_tools_are_exact(server):
    p = served(server)
    agent = Agent(AgentConfig('desk', max_new_tokens=48), PolicyBackend(p))
    groups = soon(used(p, rollouts(agent, SupportDesk(), desk_scenarios(6, 3, difficulties=(1, 2)), n=3, seed=5)))
    ts = [t for g in groups for t in g.trajectories]
    for t in ts: check_tokens(server.policy, t)
    assert sum(m.role == 'tool' for t in ts for m in t.messages) >= 5 and sum(len(t.turn_rewards) > 2 for t in ts) >= 5
    assert server.most > 1, 'conversations do not wait for each other'
    local = asyncio.run(rollouts(Agent(agent.config, PolicyBackend(server.policy)), SupportDesk(), desk_scenarios(6, 3, difficulties=(1, 2)), n=3, seed=5))
    same = [a.messages == b.messages for a, b in zip(ts, [t for g in local for t in g.trajectories], strict=True)]
    assert sum(same) >= len(same) - 2, 'the same seeds play the same episodes, but for the last digits of batches'

CHATML = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def test_a_chat_template_too(server):
    tk = make_tokenizer(_corpus(support_desk_logs(12, 0))); tk.chat_template = CHATML
    far = Policy(tiny_model(len(tk), 0, 32, 1), tk, TemplateFormat(tk))
    with serving(far) as s:
        p = ServerPolicy(s.url, 'desk', far.format)
        chat = MultiTurnAgent(AgentConfig('desk', max_new_tokens=24), PolicyBackend(p))
        async def talk(): return [await chat.respond(f'Zürich 4712 👋 {i}', seed=i) for i in range(12)]
        for r in soon(used(p, talk())): assert torch.allclose(plain_logps(far, [*r.prompt_ids, *r.ids], len(r.ids)), torch.tensor(r.logps), atol=1e-5)

# Refused

def one(**new): return lambda r: r | {'choices': [r['choices'][0] | new]}
def logps(f): return lambda r: one(logprobs={'token_logprobs': f(list(r['choices'][0]['logprobs']['token_logprobs']))})(r)

BAD = {'no ids': (one(token_ids=None), 'token_ids=null — expected token ids'),
       'ids as text': (one(token_ids=['a']), 'token_ids='),
       'true is no id': (one(token_ids=[True]), 'token_ids='),
       'no prompt': (one(prompt_token_ids=None), 'prompt_token_ids=null'),
       'a token in front': (lambda r: one(prompt_token_ids=[0, *r['choices'][0]['prompt_token_ids']])(r), 'encodes prompts anew'),
       'ids out of range': (one(token_ids=[10**6]), 'the tokenizer of the model that is served'),
       'a negative id': (one(token_ids=[-1]), 'the tokenizer of the model that is served'),
       'another text': (one(text='Zq!'), "writes 'Zq!' for tokens"),
       'a logprob missing': (logps(lambda l: [None, *l[1:]]), r'log-probabilities of \d+ of \d+ tokens'),
       'a logprob too few': (logps(lambda l: l[1:]), r'log-probabilities of \d+ of \d+ tokens'),
       'a logprob too many': (logps(lambda l: [*l, -1.]), r'log-probabilities of \d+ of \d+ tokens'),
       'no logprobs': (one(logprobs=None), r'log-probabilities of 0 of \d+'),
       'minus infinity': (logps(lambda l: [-9999., *l[1:]]), 'log-probability of -9999.0'),
       'logits': (logps(lambda l: [7.5, *l[1:]]), 'log-probability of 7.5'),
       'nan': (logps(lambda l: [math.nan, *l[1:]]), 'log-probability of nan'),
       'no token': (one(token_ids=[], text=''), 'sampled 0 tokens'),
       'aborted': (one(token_ids=[70], text='', logprobs={'token_logprobs': [-1.]}, finish_reason='abort'), "finish_reason='abort'"),
       'no choice': (lambda r: r | {'choices': []}, 'expected one completion'),
       'two choices': (lambda r: r | {'choices': r['choices'] * 2}, 'expected one completion'),
       'a list': (lambda r: [r], 'expected one completion'),
       'an error in a good status': (lambda r: {'error': {'message': 'busy'}}, 'busy')}

@pytest.mark.parametrize('what', BAD)
def test_a_bad_reply_is_refused_by_name(server, what):
    server.twist, match = BAD[what]
    p = served(server)
    with pytest.raises(BackendError, match=match): soon(used(p, p.sample(ask(server.policy), SamplingParams(24, seed=1))))
    assert len(server.asked) == 1, 'nothing is tried twice'

def test_a_server_that_goes_on_after_the_end(server):
    end = server.policy.format.end_ids[0]
    server.twist = one(token_ids=[end, 70], text='', finish_reason='length')
    p = served(server)
    with pytest.raises(BackendError, match='does not keep to stop_token_ids'): soon(used(p, p.sample(ask(server.policy), SamplingParams(24))))

@pytest.mark.parametrize('status,match', [(400, 'status 400: .*no, thank you'), (401, 'status 401.*api_key_env'), (404, 'status 404.*base_url'), (429, 'status 429.*lower limit'),
                                          (500, "status 500.*look into the server's log"), (503, 'status 503')])
def test_a_status_is_told_and_not_tried_again(server, status, match):
    server.status, p = status, served(server)
    with pytest.raises(BackendError, match=match) as e: soon(used(p, p.sample(ask(server.policy), SamplingParams(8))))
    assert len(server.asked) == 1 and e.value.status == status and e.value.__cause__ is None

@pytest.mark.parametrize('raw,match', [(b'{"choices": [{"token_ids": [1, 2', 'not JSON.*cut off'), (b'{"cut', 'cannot be reached'), (b'', 'not JSON'), (b'<html>', 'not JSON'),
                                       (b'[' * 100_000, 'not JSON'), (b'\xff\xfe', 'not JSON'), (b'null', 'expected one completion')], ids=['cut', 'cut line', 'empty', 'page', 'deep', 'bytes', 'null'])
def test_what_is_not_json_is_told(server, raw, match):
    server.raw, p = raw, served(server)
    with pytest.raises(BackendError, match=match): soon(used(p, p.sample(ask(server.policy), SamplingParams(8))))

def test_nobody_there(server):
    url = server.url
    with serving(server.policy) as gone: url = gone.url
    p = ServerPolicy(url, 'desk', server.policy.format)
    with pytest.raises(BackendError, match='127.0.0.1:.* cannot be reached: .*is the server up'): soon(used(p, p.sample(ask(server.policy), SamplingParams(8))))

@pytest.mark.parametrize('cards,match', [([{'id': 'other', 'max_model_len': 9}], "no model 'desk' — it serves other"), ([], 'it serves none'), ([{'id': 'desk'}], 'give max_context'), ('x', 'it serves none')])
def test_what_is_served_is_looked_at(server, cards, match):
    server.cards, p = cards, served(server)
    with pytest.raises(BackendError, match=match): soon(used(p, p.sample(ask(server.policy), SamplingParams(8))))
    assert not server.asked

JSON = st.recursive(st.none() | st.booleans() | st.integers(-5, 3000) | st.floats() | st.text(max_size=4), lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(['choices', 'token_ids', 'logprobs', 'text']), v, max_size=3), max_leaves=8)

@settings(max_examples=300)
@given(st.data())
def test_any_reply_is_a_turn_or_an_error_of_ours(policy, data):
    ids = ask(policy)
    c = {'index': 0, 'text': '', 'finish_reason': 'stop', 'prompt_token_ids': list(ids), 'token_ids': [70, policy.format.end_ids[0]], 'logprobs': {'token_logprobs': [-1., -.5]}}
    k = data.draw(st.sampled_from([*c, None, 'whole']))
    reply = data.draw(JSON) if k == 'whole' else {'choices': data.draw(JSON)} if k is None else {'choices': [c | {k: data.draw(JSON)}]}
    try: t = _turn(reply, ids, SamplingParams(8), policy.format, 0)
    except BackendError: return
    assert len(t.ids) == len(t.logps) and all(-9999 < x <= 1e-3 for x in t.logps) and k in ('index', 'text', 'finish_reason', 'token_ids', 'logprobs')

# Log-probabilities of what was sampled from

def test_raw_log_probabilities_are_good_enough_only_where_they_are_the_same(server):
    server.mode, p, ids = 'raw', served(server), ask(server.policy)
    async def both():
        assert await p.sample(ids, SamplingParams(8, seed=1)) and await p.sample(ids, SamplingParams(8, temperature=0))
        for how in ({'temperature': .7}, {'top_p': .9}, {'top_k': 3}):
            with pytest.raises(BackendError, match='--logprobs-mode processed_logprobs'): await p.sample(ids, SamplingParams(8, **how))
    soon(used(p, both()))

def test_the_mode_is_asked_once(server):
    p, ids = served(server), ask(server.policy)
    soon(used(p, p.sample(ids, SamplingParams(8, temperature=.7), n=5)))
    soon(used(p, p.sample(ids, SamplingParams(8, top_k=3))))
    assert len(server.asked) == 7 and server.asked[0]['top_k'] == 1 and sum('/v1/models' in h for h in server.heads) == 1

# Time, cancelling, limits

def gone(server, n, seconds=10):
    "Wait until the server has seen n requests taken back."
    end = time.monotonic() + seconds
    while server.dropped < n and time.monotonic() < end: time.sleep(.02)
    return server.dropped

def test_a_slow_server_times_out(server):
    server.delay, p = 30., served(server, timeout=.3)
    began = time.monotonic()
    with pytest.raises(BackendError, match=r'has not answered within 0\.3 s'): soon(used(p, p.sample(ask(server.policy), SamplingParams(8))))
    assert time.monotonic() - began < 10 and gone(server, 1) == 1

def test_cancelling_a_rollout_takes_its_requests_back(server):
    server.delay, p = 30., served(server)
    agent = Agent(AgentConfig('desk', max_new_tokens=16), PolicyBackend(p))
    async def go():
        before = asyncio.all_tasks()
        task = asyncio.ensure_future(rollouts(agent, SupportDesk(), desk_scenarios(4, 3), n=2))
        while len(server.asked) < 8: await asyncio.sleep(.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        assert asyncio.all_tasks() == before
    soon(used(p, go()))
    assert gone(server, 8) == 8

def test_one_failure_takes_its_siblings_back(server):
    server.delay, p = 30., served(server, timeout=.5)
    with pytest.raises(BackendError): soon(used(p, p.sample(ask(server.policy), SamplingParams(8), n=3)))
    assert gone(server, 3) == 3

def test_no_more_in_flight_than_allowed_and_waiting_is_not_timed(server):
    server.delay, p = .3, served(server, limit=2, timeout=1.5)
    assert len(soon(used(p, p.sample(ask(server.policy), SamplingParams(4), n=12)))) == 12
    assert server.most == 2

def test_an_episode_carries_its_error_and_the_rest_play_on(server):
    scenarios = desk_scenarios(4, 3)
    def twist(r):
        talk = server.policy.tokenizer.decode(r['choices'][0]['prompt_token_ids'])
        return one(token_ids=None)(r) if scenarios[1].messages[0].text in talk else r
    server.twist, p = twist, served(server)
    groups = soon(used(p, rollouts(Agent(AgentConfig('desk', max_new_tokens=16), PolicyBackend(p)), SupportDesk(), scenarios, n=2)))
    errors = [[t.error for t in g.trajectories] for g in groups]
    assert all('BackendError: the server gives token_ids=null' in e for e in errors.pop(1)) and errors == [[None, None]] * 3
    server.status = 500
    with pytest.raises(StateSetError, match='every one of 2 episodes failed.*status 500'):
        soon(used(p, rollouts(Agent(AgentConfig('desk'), PolicyBackend(p)), SupportDesk(), desk_scenarios(2, 3))))

# Versions, context, loops, keys

def test_turns_carry_the_version_that_was_served_when_they_were_asked(server):
    server.cards.append({'id': 'desk-2', 'parent': 'desk'})
    p, ids = served(server), ask(server.policy)
    async def go():
        server.delay = .5
        early = asyncio.ensure_future(p.sample(ids, SamplingParams(4)))
        while not server.asked: await asyncio.sleep(.01)
        p.updated('desk-2')
        return (await early)[0].version, (await p.sample(ids, SamplingParams(4)))[0].version
    assert soon(used(p, go())) == (0, 1)
    assert [b['model'] for b in server.asked] == ['desk', 'desk-2']
    t = soon(used(p, rollout(Agent(AgentConfig('x', max_new_tokens=8), PolicyBackend(p)), SupportDesk(), desk_scenarios(1, 3)[0])))
    assert t.policy_version == 1

def test_the_context_is_kept_to(server):
    p, ids = served(server), ask(server.policy)
    long = ids * (READS // len(ids) + 1)
    with pytest.raises(ContextFull, match=f'reads at most {READS}'): soon(used(p, p.sample(long[:READS], SamplingParams(8))))
    soon(used(p, p.sample(long[:READS - 3], SamplingParams(8, seed=3))))
    assert [b['max_tokens'] for b in server.asked] == [3]
    short = served(server, max_context=len(ids))
    with pytest.raises(ContextFull): soon(used(short, short.sample(ids, SamplingParams(8))))
    with pytest.raises(DataError, match='the context is empty'): soon(p.sample([], SamplingParams(8)))
    crowded = served(server, max_context=150)
    ts = [t for g in soon(used(crowded, rollouts(Agent(AgentConfig('desk', max_new_tokens=40), PolicyBackend(crowded)), SupportDesk(), desk_scenarios(4, 3, difficulties=(5,))))) for t in g.trajectories]
    assert all(t.error is None for t in ts) and any(t.truncated for t in ts), 'a full context cuts an episode and is no error'

def test_one_event_loop_after_another(server):
    p, ids = served(server), ask(server.policy)
    first = soon(p.sample(ids, SamplingParams(16, seed=4)))
    assert soon(used(p, p.sample(ids, SamplingParams(16, seed=4)))) == first

def test_the_key_is_the_servers_own(server, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'for-openai-only'); monkeypatch.setenv('DESK_KEY', 'for-the-desk')
    for kw in ({}, {'api_key_env': 'DESK_KEY'}):
        p = served(server, **kw)
        soon(used(p, p.sample(ask(server.policy), SamplingParams(4))))
    sent = [l.split(' ', 1)[1] for h in server.heads for l in h.split('\r\n') if l.lower().startswith('authorization')]
    assert sent == ['Bearer none'] * 2 + ['Bearer for-the-desk'] * 2
    server.status = 401
    with pytest.raises(BackendError) as e: soon(used(p, p.sample(ask(server.policy), SamplingParams(4))))
    assert 'for-the-desk' not in str(e.value) and 'for-the-desk' not in repr(p)

@pytest.mark.parametrize('url', ['localhost:8000/v1', 'ftp://host/v1', 'http:///v1', 'http://me:secret@host/v1', ''])
def test_an_address_is_one(policy, url):
    with pytest.raises(ConfigError, match='expected http://host:port/v1') as e: ServerPolicy(url, 'desk', policy.format)
    assert 'secret' not in str(e.value)

@pytest.mark.parametrize('kw', [{'limit': 0}, {'timeout': 0}, {'timeout': math.nan}], ids=str)
def test_limits_are_limits(policy, kw):
    with pytest.raises(ConfigError): ServerPolicy('http://h/v1', 'desk', policy.format, **kw)

def test_without_the_client_the_extra_is_named(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openai', None)
    with pytest.raises(MissingDependency, match=r'stateset-nb\[judge\]'): ServerPolicy('http://h/v1', 'desk', policy.format)

def test_a_served_policy_is_not_trained_here(policy):
    agent = Agent(AgentConfig('desk'), PolicyBackend(ServerPolicy('http://h/v1', 'desk', policy.format)))
    with pytest.raises(ConfigError, match='no local policy'): agent.policy

def test_seeds_of_siblings_are_those_of_a_local_policy(server):
    p = served(server)
    soon(used(p, p.sample(ask(server.policy), SamplingParams(4, seed=9), n=3)))
    assert sorted(b['seed'] for b in server.asked) == sorted(stream(9, i) for i in range(3))
    assert replace(SamplingParams(seed=9), seed=stream(9, 0)).seed < 2**63

def test_a_trainer_plays_on_the_server(server, policy, tmp_path):
    "The same episodes and the same gradients as when the policy samples for itself; its weights reach the server after each update."
    from stateset_nb.policy import load_policy, save_policy
    from stateset_nb.rewards import reward_function
    from stateset_nb.trainers import MultiTurnGRPOTrainer, TrainingConfig
    config = TrainingConfig(num_episodes=2, prompts_per_step=2, num_generations=3, max_completion_length=12, max_turns=2, learning_rate=.1, vllm_importance_sampling_correction=True)
    start = save_policy(policy, tmp_path / 'start')
    def trainer(**kw): return MultiTurnGRPOTrainer(Agent(AgentConfig('desk'), PolicyBackend(load_policy(start))), SupportDesk(), reward_function(lambda turns: len(turns[-1].text) % 3 / 2), config, scenarios=desk_scenarios(4, 0), **kw)
    async def by_server():
        there = served(server)
        versions = []
        async def sync(p):
            server.policy.model.load_state_dict(p.model.state_dict())
            server.policy.updated(); there.updated()
            versions.append(there.version)
        return *await used(there, rounds(trainer(sampler=there, sync=sync))), versions
    async def rounds(t):
        await t.initialize()
        t.optimizer = Recorder(t.policy.model, config.learning_rate)  # Adam would make whole steps of the noise in a gradient of nothing
        return [m async for m in t.steps()], torch.stack(t.optimizer.grads)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    try:
        (log, there, versions), (plain, here) = soon(by_server()), soon(rounds(trainer()))
    finally: policy.model.load_state_dict(before); policy.updated()
    assert versions == [1, 2, 3] and [m['reward'] for m in log] == [m['reward'] for m in plain] and 'entropy' not in log[0]
    assert log[1]['sampling/sampling_logp_difference/mean'] < 1e-4, 'the server plays with the new weights'
    assert len(here) == 2 and (there - here).abs().max() < 1e-4 * here.abs().max()
    with pytest.raises(ConfigError, match='go together'): trainer(sampler=server)
