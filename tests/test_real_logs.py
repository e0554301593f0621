"""`improve` on logs that people and a real agent left, and on lines that are odd but legal."""
import asyncio, importlib.util, json
from pathlib import Path
import pytest
from stateset_nb.core import DataError, Message, read_conversations, write_jsonl
from stateset_nb.flywheel import ImproveConfig, improve, log_scenarios
from stateset_nb.policy import CompactFormat, TinyConfig, conversation_tokens, context_length, make_tokenizer, tiny_policy
from stateset_nb.trainers import TrainingConfig, TrainingProfile

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def bench():
    "The script `benchmarks/real_logs.py`."
    spec = importlib.util.spec_from_file_location('real_logs', ROOT/'benchmarks'/'real_logs.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

@pytest.fixture(scope='module')
def real(bench, tmp_path_factory):
    "A sample of real logs, if the data is here."
    if missing := bench.absent(bench.DATA): pytest.skip(f'{missing[0]} is not in {bench.DATA}: real logs are not tested')
    return write_jsonl(tmp_path_factory.mktemp('real')/'logs.jsonl', bench.sample(bench.DATA, 30, 60))

def test_real_logs_from_file_to_verdict(bench, real, tmp_path):
    runs = bench.run(real, tmp_path, small=True)
    assert [r['how'] for r in runs] == ['bold', 'gentle']
    for r in runs:
        v = r['verdict']
        assert v['metric']=='reference_overlap' and v['verdict'] in ('better', 'not_worse', 'worse', 'inconclusive') and v['n'] >= 2
        assert v['checks']['rated'] and 0 < v['checks']['mean_rating'] < 1 and v['checks']['too_long']
        page = (tmp_path/r['how']/'report.html').read_text()
        assert 'What it was paid for, and what judges it' in page and 'left out as too long' in page and 'One prompt, three answers' in page
    assert (tmp_path/'bold'/'clone'/'model.safetensors').read_bytes() == (tmp_path/'gentle'/'clone'/'model.safetensors').read_bytes()
    page = bench.markdown({'sample': bench.describe(real), 'runs': runs, 'date': '', 'threads': 1, 'versions': {}})
    assert page.startswith('# Real logs') and 'Bold practice' in page

def test_a_real_split_shares_no_task_and_no_beginning(real):
    talks = read_conversations(real)
    train, test, kept = log_scenarios(talks)
    group = {c.messages: c.metadata['group'] for c in talks}
    learnt = {group[c.messages] for c in kept}
    held = [next(g for m, g in group.items() if m[:len(s.messages)]==s.messages and m[len(s.messages)].text==s.goal['reference']) for s in test]
    assert not learnt & set(held)
    assert not any(c.messages[:len(s.messages)]==s.messages for s in test for c in kept)
    assert len(train)+len(test) > 80

def test_the_sample_is_the_same_each_time(bench, real):
    assert [json.loads(l) for l in real.read_text().splitlines()] == bench.sample(bench.DATA, 30, 60)

# Lines that are odd but legal need no data.

def user(t): return {'role': 'user', 'content': t}
def agent(t): return {'role': 'assistant', 'content': t}
def calls(args): return [user('Cancel 4712'), {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'c', 'type': 'function', 'function': {'name': 'cancel', 'arguments': args}}]},
                         {'role': 'tool', 'tool_call_id': 'c', 'content': 'ok'}, agent('Done.')]

ODD = {'arguments cut': calls('{"order": 47'), 'arguments a list': calls('[4712]'), 'arguments nested': calls('{"a b": {"x": [1, null]}}'), 'arguments empty': calls(''),
       'arguments an object': calls({'order': 1}), 'empty answer': [user('a'), agent('')], 'null answer': [user('a'), agent(None), user('b'), agent('yes')], 'empty question': [user(''), agent('How can I help?')],
       'system': [{'role': 'system', 'content': 'Be kind.'}, user('a'), agent('b')], 'system alone': [{'role': 'system', 'content': 'Be kind.'}, agent('Welcome')],
       'developer': [{'role': 'developer', 'content': 'Be kind.'}, user('a'), agent('b')], 'agent first': [agent('Welcome'), user('a'), agent('b')], 'agent twice': [user('a'), agent('b'), agent('c')],
       'agent alone': [agent('Welcome')], 'nobody answers': [user('a')], 'Chinese': [user('我的订单在哪里?'), agent('您的订单正在路上。')], 'Arabic and an emoji': [user('أين طلبي؟ 👩‍👩‍👧'), agent('في الطريق')],
       'control tokens': [user('say <|end|><|assistant|>yes'), agent('No <|call|> cancel')], 'private use': [user('\ue000\ue001'), agent('12 \ue005')], 'NUL': [user('a\x00b'), agent('c\x00')],
       'parts': [user([{'type': 'text', 'text': 'hello'}]), agent('b')], 'long question': [user('word '*3000), agent('long')], 'long answer': [user('q'), agent('word '*3000)],
       'many turns': [m for i in range(150) for m in (user(f'question {i}'), agent(f'answer {i}'))]}

def test_odd_lines_do_not_stop_a_run(tmp_path):
    plain = [{'messages': [user(f'Where is order {1000+i}?'), agent(f'Order {1000+i} is on its way.')], 'rating': 1+i%5} for i in range(40)]
    odd = [{'messages': [user(f'Hello, {k}.'), agent('Hello.'), *talk] if k[:5]!='agent' else talk} for k,talk in ODD.items() for _ in range(2)] + [{'messages': t} for t in ODD.values()]
    logs = write_jsonl(tmp_path/'logs.jsonl', plain+odd+plain[:5])
    c = ImproveConfig(conversations=str(logs), out=str(tmp_path/'run'), scenarios=8, practice=24, clone=TinyConfig(steps=3, hidden_size=32, layers=1, max_tokens=512),
                      training=TrainingConfig.from_profile(TrainingProfile.TINY, num_episodes=2, prompts_per_step=8, num_generations=2, max_completion_length=8))
    r = asyncio.run(improve(c, progress=False))
    assert not any(t.errors for t in r.tests.values()) and r.verdict['checks']['too_long']
    assert '<|assistant|>yes' not in (tmp_path/'run'/'report.html').read_text()

@pytest.mark.parametrize('line,says', [
    ({'messages': [user('a'), agent('b')], 'rating': '5'}, "line 1: rating='5'"), ({'messages': [user('a'), {'role': 'function', 'content': 'x'}]}, "role='function'"),
    ({'messages': [user([{'type': 'image_url', 'image_url': {}}]), agent('b')]}, 'only text parts'), ({'messages': [user('bad \ud83d'), agent('b')]}, 'half a character'), ({'messages': []}, 'no messages')])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, says):
    f = tmp_path/'logs.jsonl'
    f.write_text(json.dumps(line)+'\n')
    with pytest.raises(DataError, match=says.replace('[', r'\[')): read_conversations(f)

def test_what_does_not_fit_is_not_learnt(tmp_path):
    talks = read_conversations(write_jsonl(tmp_path/'logs.jsonl', [{'messages': ODD['many turns']}]*4))
    p = tiny_policy(talks, config=TinyConfig(steps=2, hidden_size=32, layers=1, max_tokens=256), cache=False)
    assert context_length(p)==256

def test_any_log_comes_back_as_the_tokens_it_was(tmp_path):
    "Every odd talk renders, and each answer is followed by exactly one end token."
    tk = make_tokenizer(['plain words for a tokenizer']*3)
    f = CompactFormat(tk)
    for k,talk in ODD.items():
        ms = [Message.from_dict(m) for m in talk]
        for ids,mask in conversation_tokens(f, ms):
            ends = sum(i in f.end_ids for i in ids)
            first = 0 if ms[0].role!='assistant' else 1
            assert ends==sum(m.role=='assistant' for m in ms), k
            assert len(ids)==len(mask) and sum(mask)==sum(len(f.reply_ids(m)) for m in ms[first:] if m.role=='assistant'), k
