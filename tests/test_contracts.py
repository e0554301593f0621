"""What users wrote against, or stored, goes on working: the README's snippets, the calls people know, files of every schema, and the two checkers.

`python tests/test_contracts.py` writes the golden files that are missing; those that are there are never written again.
"""
import ast, asyncio, contextlib, inspect, io, json, pkgutil, re, shutil, tempfile
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import stateset_nb
from stateset_nb.core import (Conversation, DataError, Feedback, Message, Preference, RewardExample, Scenario, Segment, ToolCall, TrainingExample, Trajectory, TrajectoryGroup,
                              demo_conversations, write_jsonl)

GOLDEN = Path(__file__).parent/'golden'
README = Path(__file__).parent.parent/'README.md'

# ---- the README's snippets

def run_cell(source, names):
    "Run a snippet as a notebook would: top-level await, and the last value shown."
    tree, shown = ast.parse(source), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    async def go(code):
        res = eval(code, names)
        return await res if inspect.iscoroutine(res) else res
    def run(node): return asyncio.run(go(compile(node, 'README', 'exec' if isinstance(node, ast.Module) else 'eval', flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)))
    with contextlib.redirect_stdout(shown):
        run(tree)
        if last is not None and (v := run(ast.Expression(last.value))) is not None: print(v)
    return shown.getvalue()

def small_runs(monkeypatch):
    "The defaults of a run in miniature: the same stages, few steps."
    from stateset_nb import flywheel
    tiny, practice = flywheel.TinyConfig, flywheel.practice_for
    monkeypatch.setattr(flywheel, 'TinyConfig', lambda **kw: tiny(**kw | {'steps': 6, 'hidden_size': 16, 'layers': 1}))
    monkeypatch.setattr(flywheel, 'practice_for', lambda *about: replace(practice(*about), num_episodes=2, prompts_per_step=2, num_generations=2, max_completion_length=8))

def test_every_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    small_runs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    talks = [replace(c, id=f'{c.id}-{i}', messages=(Message('user', f'Case {i}.'), *c.messages)) for i in range(5) for c in demo_conversations()]
    write_jsonl('logs.jsonl', [c.to_dict() for c in talks])
    write_jsonl('labels.jsonl', [{'prompt': f'Where is parcel {i}?', 'response': f'It arrives on day {i}.', 'score': i % 5, 'scale': [0, 4]} for i in range(20)])
    snippets = re.findall(r'^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?', README.read_text(encoding='utf-8'), re.S | re.M)
    assert len(snippets) >= 4
    names = {}
    for source, shown in snippets:
        said = run_cell(source, names)
        if shown: assert said == shown, source
    assert names['result'].verdict['verdict'] in ('better', 'not_worse', 'worse', 'inconclusive') and (tmp_path/'runs/mine/report.html').is_file()

# ---- the calls people know

class Polite(stateset_nb.RewardFunction):
    async def compute_reward(self, turns, context=None): return stateset_nb.RewardResult(float('sorry' in turns[-1].text.lower()))

@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
    from stateset_nb import TinyConfig, save_policy, tiny_policy
    return str(save_policy(tiny_policy(demo_conversations(), config=TinyConfig(steps=3, hidden_size=16, layers=1), cache=False), tmp_path_factory.mktemp('model')/'m'))

@pytest.mark.parametrize('name', ['SingleTurnGRPOTrainer', 'MultiTurnGRPOTrainer'])
def test_a_trainer_is_called_as_ever(model_folder, name):
    from stateset_nb import Agent, AgentConfig, ConversationEnvironment, MultiTurnAgent, TrainingConfig
    kind = Agent if name.startswith('Single') else MultiTurnAgent
    agent = kind(AgentConfig(model_name=model_folder))
    environment = ConversationEnvironment(scenarios=[Scenario(f's{i}', c.messages[:1]) for i, c in enumerate(demo_conversations())])
    config = TrainingConfig(num_episodes=50, prompts_per_step=1, num_generations=2, max_completion_length=4)
    async def go():
        trainer = getattr(stateset_nb, name)(agent=agent, environment=environment, reward_fn=Polite(), config=config)
        await trainer.initialize()
        return await trainer.train(), trainer
    trained, trainer = asyncio.run(go())
    assert trained is agent and trainer.step == 50
    assert isinstance(asyncio.run(agent.generate_response([{'role': 'user', 'content': 'Where is my order?'}])), str)

# ---- files of every schema

def records():
    "Every record of the package that is written with a schema."
    for m in pkgutil.iter_modules(stateset_nb.__path__):
        if m.name.startswith('_'): continue
        for x in vars(import_module(f'stateset_nb.{m.name}')).values():
            if isinstance(x, type) and is_dataclass(x) and x.__module__ == f'stateset_nb.{m.name}' and not x.__name__.startswith('_') and 'schema' in {f.name for f in fields(x)}: yield x

def keeps(old, new):
    "What was stored is there unchanged; a newer version may know more."
    if isinstance(old, dict): return isinstance(new, dict) and all(k in new and keeps(v, new[k]) for k, v in old.items())
    if isinstance(old, list): return isinstance(new, list) and len(old) == len(new) and all(map(keeps, old, new))
    return old == new

@pytest.mark.parametrize('kind', list(records()), ids=lambda c: c.__name__)
def test_a_stored_record_still_loads(kind):
    f = GOLDEN/f'{kind.__name__}.json'
    assert f.is_file(), f'{kind.__name__} has no stored example — add one to `examples`, then run `python tests/test_contracts.py`'
    d = json.loads(f.read_text(encoding='utf-8'))
    assert d['schema'] == 1 and set(d) <= {x.name for x in fields(kind)}
    assert keeps(d, kind.from_dict(d).to_dict())
    with pytest.raises(DataError, match='upgrade'): kind.from_dict(d | {'schema': 2})
    if kind is not Conversation:  # there, unknown keys of a log are kept
        with pytest.raises(DataError, match='colour'): kind.from_dict(d | {'colour': 'red'})

def start():
    "The policy that the golden checkpoint was trained from."
    from stateset_nb.policy import CompactFormat, Policy, make_tokenizer, tiny_model
    torch.manual_seed(0)
    tk = make_tokenizer(['Where is my order?'])
    return Policy(tiny_model(len(tk), hidden_size=8, layers=1), tk, CompactFormat(tk))

def trainer(out=None, **kw):
    from stateset_nb import Agent, AgentConfig, ConversationEnvironment, MultiTurnGRPOTrainer, PolicyBackend, TrainingConfig
    scenarios = [Scenario('s', (Message('user', 'Where is my order?'),))]
    return MultiTurnGRPOTrainer(Agent(AgentConfig('tiny'), PolicyBackend(start())), ConversationEnvironment(scenarios=scenarios), Polite(),
                                TrainingConfig(**dict(num_episodes=2, prompts_per_step=1, num_generations=2, max_completion_length=4) | kw), output_dir=out)

def test_a_stored_checkpoint_still_loads(tmp_path):
    shutil.copytree(GOLDEN/'checkpoint-1', tmp_path/'checkpoint-1')
    t = trainer(tmp_path, num_episodes=3, micro_batch_tokens=8192)  # the default when it was written; a run goes on with its own settings
    async def go():
        await t.load_checkpoint(tmp_path/'checkpoint-1')
        was = [p.clone() for p in t.policy.model.parameters()]
        await t.train()
        return was
    was = asyncio.run(go())
    assert t.step == 3 and sum(p.numel() for p in was) == sum(p.numel() for p in t.policy.model.parameters())

def test_a_stored_verdict_has_its_keys():
    "verdict.json is read by other programs."
    from stateset_nb.flywheel import ImproveConfig, make_verdict
    from stateset_nb import TestResult, TestResults
    tests = {k: TestResults(tuple(TestResult(f's{i}', 0, i % 3 == 0) for i in range(6)), k, 0, 1, 'x') for k in ('logs', 'clone sampled', 'clone served', 'trained sampled', 'trained served')}
    then, now = json.loads((GOLDEN/'verdict.json').read_text()), make_verdict(tests, ImproveConfig())
    assert then.keys() - {'checks'} <= now.keys() and then['comparisons'][0].keys() <= now['comparisons'][0].keys()

# ---- the checker of rewards: a table of broken ones, each caught (that of environments is in test_environments.py)

def broken_rewards():
    import random
    R, turns_of = stateset_nb.RewardResult, lambda t: t[-1].text
    class Score(stateset_nb.RewardFunction):
        async def compute_reward(self, turns, context=None): return R(.5)
    class Class: pass
    class Sync(Score):
        def compute_reward(self, turns, context=None): return R(.5)
    class Bare(Score):
        async def compute_reward(self, turns, context=None): return .5
    class High(Score):
        async def compute_reward(self, turns, context=None): return R(float(len(turns)))
    class Nan(Score):
        async def compute_reward(self, turns, context=None): return R(float('nan'))
    class Text(Score):
        async def compute_reward(self, turns, context=None): return R('good')
    class Divides(Score):
        async def compute_reward(self, turns, context=None): return R(min(1, 1/len(turns_of(turns).split())))
    class Pops(Score):
        async def compute_reward(self, turns, context=None):
            turns.pop()
            return R(.5)
    class Seeds(Score):
        async def compute_reward(self, turns, context=None):
            random.seed(0)
            return R(.5)
    class Dice(Score):
        rng = random.Random(0)
        async def compute_reward(self, turns, context=None): return R(self.rng.random())
    class Remembers(Score):
        def __init__(self): self.seen = 0
        async def compute_reward(self, turns, context=None):
            self.seen += 1
            return R(1/self.seen)
    class Backwards(Score):
        async def compute_reward(self, turns, context=None): return R(1/(1+len(turns_of(turns))))
        async def compute_rewards(self, list_of_turns, contexts=None): return [await self.compute_reward(t) for t in reversed(list_of_turns)]
    class Loses(Score):
        async def compute_rewards(self, list_of_turns, contexts=None): return [R(.5)]
    class Nameless(Score): name = ''
    return {'contract': [Class, Nameless()], 'awaitable': [Sync()], 'type': [Bare(), Text()], 'range': [High()], 'finite': [Nan()], 'fails': [Divides()], 'mutates': [Pops()],
            'randomness': [Seeds()], 'batch': [Backwards(), Loses()], None: [Dice(), Remembers()]}

@pytest.mark.parametrize('rule, reward', [(k, r) for k, rs in broken_rewards().items() for r in rs], ids=lambda x: type(x).__name__ if not isinstance(x, str | None) else x or 'any')
def test_the_checker_catches_a_broken_reward(rule, reward):
    report = asyncio.run(stateset_nb.check_reward(reward, strict=False))
    assert not report.ok and (rule is None or rule in report.breaches), report.breaches
    with pytest.raises(stateset_nb.ConfigError): asyncio.run(stateset_nb.check_reward(reward))

# ---- writing what is missing

def examples():
    "One example of every record, each field away from its default where it has one."
    from stateset_nb import ABTestResult, ComparisonTable, Criterion, ExampleFilter, ExportReport, IngestReport, Interval, JudgeAgreement, Label, LabelEvent, PairedComparison, Refusal, RewardHistory, Rubric, TestResult, TestResults, TrainingMetrics
    call = ToolCall('refund_order', '{"order_id": "4712"}', 'c1')
    talk = (Message('user', 'Refund #4712 ☂'), Message('assistant', None, (call,)), Message('tool', 'done', (), 'c1', 'refund_order'), Message('assistant', 'It is refunded.'))
    segment = Segment((11, 22, 33), (0, 1, 1), (0., -.25, -.5), ((1, 3),))
    t = Trajectory('s/0', 's', 7, talk, (segment, replace(segment, parent=0)), (0., 1.), {'helpfulness': .5}, True, False, None, 3, {'success': True})
    p = PairedComparison('success', 'better', before=.42, after=.49, difference=.07, low=.02, high=.12, n=200, n_more=0, margin=.05, confidence=.95, bound=.03, within_margin=True, p_value=.006, trials=4)
    r = TestResult('s', 1, True, {'reward': 1.}, None, 2, ('refund',), ({'kind': 'refund', 'success': True},), t)
    tests = TestResults((r,), 'agent', 3, 2, 'abc')
    table = ComparisonTable(('success',), (p,))
    chosen = ExampleFilter(4, 5, .9, 1, 'desk', 'm', 'log', 'train', 'r1', 's', '2026-01-01', '2026-02-01', 'human')
    return [Conversation(talk, 'c-1', 4.0, {'group': 'g'}), Scenario('s', talk[:1], {'n': 1}, 2, ('refund',)), segment, t, TrajectoryGroup('s', (t, replace(t, id='s/1', error='boom'))),
            TrainingExample('e', talk[:1], talk[-1], 's', 'human', {'quality': .5, 'tools': None}, {'tokens': 12.}), Feedback('e', 4, (1, 5), 'ann', 'good', 'Better: hello.'),
            RewardExample(talk[:1], 'It is refunded.', 3., (0, 5), (3., 4.), 'g'), Preference('Where?', 'Here.', 'Whatever.', 'g'), p, r, tests,
            TrainingMetrics(task_completion_rate=Interval(.5, .4, .6, 100)), table, ABTestResult(tests, tests, table), r,
            Rubric((Criterion('right', 'Is it true?', ((1, 'false'), (4, 'true')), 2.),), 1, 4, 'The record decides.'), JudgeAgreement('pairs', 40, {'kappa': Interval(.5, .4, .6, 40)}, {'length': 'all as long'}),
            RewardHistory(({'phase': 1, 'epoch': 1, 'loss': .5, 'val_loss': .25},)), chosen, ExportReport('sft.jsonl', 'trl', 12, 'ab12', chosen),
            IngestReport(9, 3, 2, 1, 1, 2, (Refusal('log.jsonl line 4', 'no messages'),), {'NAME': 3}),
            LabelEvent('key-1', 'ann', 'label', 'e1⟷e2', Label(None, 'right', (1, 0), {'speed': 4}, 'Says when.', 'It comes on Monday.', ('track_parcel',)), 1770000000.5, 7.25)]

if __name__ == '__main__':
    for x in examples():
        f = GOLDEN/f'{type(x).__name__}.json'
        if not f.exists(): f.write_text(json.dumps(x.to_dict(), indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    if not (GOLDEN/'checkpoint-1').exists():
        with tempfile.TemporaryDirectory() as tmp:
            asyncio.run(trainer(tmp, save_steps=1).train())
            shutil.copytree(f'{tmp}/checkpoint-1', GOLDEN/'checkpoint-1')
