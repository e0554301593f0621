"""Attempts to break the loop in one call: killed at any moment, fed with odd logs, asked to mix runs - and a report that must not call home."""
import asyncio, json, os, random, re, shutil, signal
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
import pytest
from stateset_nb.core import ConfigError, DataError, Message, write_jsonl
from stateset_nb.environments import desk_scenarios, support_desk_logs
from stateset_nb.evaluation import TestResults
from stateset_nb.flywheel import RIVALS, ImproveConfig, ReferenceOverlap, RunFolder, check_verdict, copy_accuracy, improve, log_scenarios, plan, praised_talks, read_labels
from stateset_nb.policy import TinyConfig, load_policy
from stateset_nb.reward_model import RewardTrainingConfig
from stateset_nb.rewards import CompositeReward, EpisodeContext, HelpfulnessReward
from stateset_nb.trainers import TrainingConfig, TrainingProfile

TRAINING = TrainingConfig.from_profile(TrainingProfile.TINY, num_episodes=3, prompts_per_step=2, num_generations=2, max_completion_length=12, save_steps=1, save_total_limit=1)
CLONE = TinyConfig(10, 4, hidden_size=32, layers=1, max_tokens=512)

def mini(out, **kw): return ImproveConfig(**{'out': str(out), 'logs': 40, 'practice': 6, 'scenarios': 6, 'clone': CLONE, 'training': TRAINING, 'filtered_steps': 4} | kw)
def go(config, resume=False): return asyncio.run(improve(config, resume, progress=False))
def strict(f): return json.loads(Path(f).read_text(encoding='utf-8'), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))

def user(t): return {'role': 'user', 'content': t}
def agent(t): return {'role': 'assistant', 'content': t}
EVIL = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)>\u2028'

@pytest.fixture(scope='module')
def logs(tmp_path_factory):
    "Forty conversations of people who would like to own the page."
    talks = [{'messages': [user(f'{EVIL} Where is order {1000 + i}?'), agent(f'{EVIL} Order {1000 + i} is on its way.'), user('Thanks'), agent('You are welcome, ' + 'abc'[i % 3])], 'rating': 1 + i % 5} for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp('logs') / '<b>logs & more.jsonl', talks)

@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A finished run on the support desk."
    return go(mini(tmp_path_factory.mktemp('desk') / 'run'))

@pytest.fixture(scope='module')
def real(tmp_path_factory, logs):
    "A finished run on logs."
    return go(mini(tmp_path_factory.mktemp('real') / 'run', conversations=str(logs)))

@pytest.fixture(scope='module')
def labels(tmp_path_factory):
    "What people said: kind answers are good, curt ones are not, and one rater is kinder than the other."
    rows = [{'messages': [user(f'{EVIL} Where is order {2000 + i}?')], 'response': ('I am sorry for the wait, your order is on its way.', 'No idea, ask somebody else.')[i % 2], 'ratings': [5 - 3 * (i % 2), 4 - 3 * (i % 2)], 'scale': [1, 5], 'group': f'g{i}'} for i in range(160)]
    return write_jsonl(tmp_path_factory.mktemp('labels') / '<i>labels.jsonl', rows)

LEARN = RewardTrainingConfig(heads=2)

@pytest.fixture(scope='module')
def liked(tmp_path_factory, logs, labels):
    "A finished run on logs that is paid by what people like."
    return go(mini(tmp_path_factory.mktemp('liked') / 'run', conversations=str(logs), labels=str(labels), reward=LEARN))

# What a run leaves

FILES = {'clone', 'policy', 'tests', 'checkpoint-3', 'metrics.jsonl', 'trajectories.jsonl', 'verdict.json', 'report.html', 'run.json'}
KEYS = {'schema', 'metric', 'verdict', 'before', 'after', 'difference', 'low', 'high', 'n', 'seed', 'served_success', 'margin', 'comparisons', 'checks', 'sentence', 'before_is', 'after_is', 'n_more'}

def test_a_run_leaves_its_files_and_a_verdict_that_anybody_can_read(desk, real):
    assert {p.name for p in desk.folder.iterdir()} == FILES | {'filtered'} and {p.name for p in real.folder.iterdir()} == FILES
    for r in (desk, real):
        v = strict(r.folder / 'verdict.json')
        assert v == r.verdict and KEYS <= v.keys() and v['verdict'] in ('better', 'not_worse', 'worse', 'inconclusive')
        assert v['low'] <= v['difference'] <= v['high'] and v['difference'] == pytest.approx(v['after'] - v['before'], abs=1e-9)
        assert (v['before_is'], v['after_is']) == ('clone sampled', 'trained sampled') and v['sentence'] == r.sentence()
        for c in v['comparisons']: assert c['before_is'] in r.tests and c['after_is'] in r.tests and c['low'] <= c['difference'] <= c['high']
        assert strict(r.folder / 'run.json')['done'] is True
        for name in ('metrics.jsonl', 'trajectories.jsonl'): [json.loads(l) for l in (r.folder / name).read_text(encoding='utf-8').split('\n')[:-1]]
        assert load_policy(r.folder / 'policy').name and not [p for p in r.folder.rglob('*') if p.suffix in ('.pt', '.bin', '.pkl')]
    assert set(desk.tests) == {'logs', *(f'{k} {how}' for k in RIVALS if k != 'logs' for how in ('sampled', 'served'))}
    assert desk.verdict['metric'] == 'success' and real.verdict['metric'] == 'reference_overlap'
    assert not {s.id for s in desk_scenarios(6, 0)} & {r.scenario_id for r in desk.tests['clone served'].results}

class Page(HTMLParser):
    "Every tag with its attributes."
    def __init__(self, text): super().__init__(); self.tags, self.text = [], []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text.append(data)

def test_the_report_asks_nobody_and_runs_nothing(desk, real):
    for r in (desk, real):
        page = Page((r.folder / 'report.html').read_text(encoding='utf-8'))
        assert {t for t, _ in page.tags} <= {'html', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'h3', 'p', 'br', 'small', 'table', 'tr', 'th', 'td', 'img', 'details', 'summary', 'div', 'b', 'span', 'code', 'i', 'em'}
        for tag, attrs in page.tags:
            assert not [a for a in attrs if a.startswith('on') or a in ('href', 'srcset', 'action', 'background')], (tag, attrs)
            if 'src' in attrs: assert attrs['src'].startswith('data:image/png;base64,')
            assert 'url(' not in attrs.get('style', '')
        assert not re.search(r'@import|url\(', ''.join(page.text))
    shown = (real.folder / 'report.html').read_text(encoding='utf-8')
    assert '<script' not in shown and 'evil.example/x.png"' not in shown and '&lt;script&gt;' in shown and '&lt;b&gt;logs &amp; more' in shown
    assert '<b>' not in real._repr_html_().replace(f'<b>{real.verdict["verdict"]}</b>', '')

def test_what_was_done_is_not_done_again(desk):
    when = {p: p.stat().st_mtime_ns for p in desk.folder.rglob('*') if p.is_file() and p.name not in ('run.json', 'verdict.json', 'report.html')}
    again = go(mini(desk.folder), resume=True)
    assert again.verdict == desk.verdict and when == {p: p.stat().st_mtime_ns for p in when}

# Settings

CHANGED = {'conversations': None, 'labels': None, 'reward': None, 'model': None, 'out': None, 'seed': 3, 'logs': 30, 'practice': 5, 'scenarios': 5, 'margin': .2, 'clone': replace(CLONE, steps=12), 'training': replace(TRAINING, num_episodes=2), 'filtered_steps': 0}

def left(r):
    "What somebody could look at: verdict, who was tested, weights, rows and talks of practice."
    def no_time(m): return {k: v for k, v in m.items() if not k.startswith('time/')}
    return (r.verdict, sorted(r.tests), {n: (r.folder / n / 'model.safetensors').read_bytes() for n in ('clone', 'policy')}, [no_time(json.loads(l)) for l in (r.folder / 'metrics.jsonl').read_text().splitlines()],
            {n: [x.success for x in t.results] for n, t in r.tests.items()}, (r.folder / 'trajectories.jsonl').read_bytes())

def test_every_setting_changes_what_comes_out(desk, real, liked, logs, labels, tmp_path):
    assert set(CHANGED) == {f.name for f in fields(ImproveConfig)}, 'a new setting needs a line here'
    assert left(go(mini(tmp_path / 'same'))) == left(desk), 'the same settings, the same run'
    for k, v in CHANGED.items():
        if v is not None: assert left(go(mini(tmp_path / k, **{k: v}))) != left(desk), f'{k} changes nothing'
    assert left(real) != left(desk)                               # conversations
    assert left(liked) != left(real)                              # labels
    assert left(go(mini(tmp_path / 'reward', conversations=str(logs), labels=str(labels), reward=replace(LEARN, heads=1)))) != left(liked)
    named = go(mini(tmp_path / 'named', conversations=str(logs), model=str(real.folder / 'policy')))
    assert left(named) != left(real) and 'as it came' in (named.folder / 'report.html').read_text()
    with pytest.raises(ConfigError, match='model='): plan(mini(tmp_path / 'x', model='gpt2'))
    with pytest.raises(ConfigError, match='model='): plan(mini(tmp_path / 'x', model='no such/thing at all', labels=str(labels)))
    texts = {'labels': plan(mini('out', labels=str(labels)))} | {k: plan(mini('out', **{k: v})) for k, v in CHANGED.items() if v is not None and k != 'margin'} | {'out': plan(mini('elsewhere')), 'conversations': plan(mini('out', conversations=str(logs)))}
    assert len(set(texts.values()) | {plan(mini('out'))}) == len(texts) + 1, 'the plan names each of them'

@pytest.mark.parametrize('kw', [{'logs': 9}, {'logs': 40.}, {'practice': 0}, {'scenarios': 1}, {'filtered_steps': -1}, {'seed': -1}, {'seed': True}, {'margin': 0}, {'margin': 1}, {'training': TrainingConfig(seed=5)}], ids=str)
def test_settings_out_of_range_are_refused(kw):
    with pytest.raises(ConfigError, match=next(iter(kw))): mini('x', **kw)

@pytest.mark.parametrize('kw', [{'steps': -1}, {'batch_size': 0}, {'hidden_size': 30}, {'hidden_size': 4}, {'layers': 0}, {'vocab_size': 0}, {'max_tokens': 1}, {'learning_rate': 0}, {'short_first': 1.5}, {'steps': 1.5}], ids=str)
def test_a_tiny_policy_that_cannot_be_is_refused(kw):
    with pytest.raises(ConfigError, match=next(iter(kw))): TinyConfig(**kw)

# Folders

def test_a_folder_holds_one_run(desk, logs, tmp_path):
    with pytest.raises(ConfigError, match='holds a run already'): go(mini(desk.folder))
    for k, v in CHANGED.items():
        if v is not None:
            with pytest.raises(ConfigError, match=f'begun with another {k}'): RunFolder(desk.folder, mini(desk.folder, **{k: v}), resume=True)
    assert 'holds a run already' in plan(mini(desk.folder))
    moved = shutil.copytree(desk.folder, tmp_path / 'moved')
    assert go(mini(moved), resume=True).verdict == desk.verdict, 'where it lies is no setting'
    for text in ('', '{"schema": 1', '[]', '{}', 'null'):
        (moved / 'run.json').write_text(text)
        with pytest.raises(DataError, match=r'run\.json'): RunFolder(moved, mini(moved), resume=True)
    (tmp_path / 'file').write_text('x')
    with pytest.raises(ConfigError, match='cannot write'): RunFolder(tmp_path / 'file' / 'run', mini(tmp_path))
    mine = shutil.copy(logs, tmp_path / 'logs.jsonl')
    c = mini(tmp_path / 'run', conversations=str(mine))
    RunFolder(c.out, c)
    with open(mine, 'a', encoding='utf-8') as f: f.write(json.dumps({'messages': [user('x'), agent('y')]}) + '\n')
    with pytest.raises(ConfigError, match='another conversations_sha256'): RunFolder(c.out, c, resume=True)

def test_a_run_that_cannot_start_leaves_nothing(tmp_path):
    none, empty, silent = tmp_path / 'none.jsonl', tmp_path / 'empty.jsonl', tmp_path / 'silent.jsonl'
    empty.write_text('\n\n')
    write_jsonl(silent, [{'messages': [user('a')]}] * 3)
    for kw, error in (({'conversations': str(none)}, DataError), ({'conversations': str(empty)}, DataError), ({'conversations': str(silent)}, DataError), ({'conversations': str(tmp_path)}, DataError), ({'model': 'no such model'}, ConfigError)):
        with pytest.raises(error): go(mini(tmp_path / 'run', **kw))
        assert not (tmp_path / 'run').exists()

@pytest.mark.parametrize('line, says', [('{"messages": ' + '[' * 100_000, 'line 2'), ('{"messages": [{"role": "user", "content": "a"}], "rating": ' + '9' * 5000 + '}', 'line 2'), ('{"messages": [{"role": "user", "content": "a"}], "rating": NaN}', 'line 2'),
                                        ('{"messages": "hello"}', 'line 2'), ('\x00', 'line 2'), ('["a"]', 'line 2'), ('{"a": 1', 'line 2')])
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, says):
    f = tmp_path / 'l.jsonl'
    f.write_text(json.dumps({'messages': [user('a'), agent('b')]}) + '\n' + line + '\n')
    with pytest.raises(DataError, match=says): plan(mini(tmp_path / 'r', conversations=str(f)))

def test_logs_as_other_programs_write_them(tmp_path):
    talks = [json.dumps({'messages': [user(f'q{i}'), agent(f'a{i}')], 'id': 'same', 'anything': {'else': [1]}}, ensure_ascii=i % 2) for i in range(30)]
    for name, data in {'windows': '\ufeff' + '\r\n'.join(talks), 'blank lines': '\n \n'.join(talks) + '\n\n', 'no end': '\n'.join(talks)}.items():
        f = tmp_path / f'{name}.jsonl'
        f.write_bytes(data.encode())
        assert '30 conversations' in plan(mini('x', conversations=str(f), practice=30)) or 'conversations from' in plan(mini('x', conversations=str(f)))
    (tmp_path / 'latin.jsonl').write_bytes('{"messages": [{"role": "user", "content": "größe"}]}'.encode('latin-1'))
    with pytest.raises(DataError, match='UTF-8'): plan(mini('x', conversations=str(tmp_path / 'latin.jsonl')))

# Judges

# Labels

def test_a_reward_is_learnt_from_labels_and_practice_is_paid_by_it(liked, real):
    assert {p.name for p in liked.folder.iterdir()} == FILES | {'reward_model', 'reward.json'}
    known, verdict = strict(liked.folder / 'reward.json'), strict(liked.folder / 'verdict.json')
    assert set(verdict) == KEYS | {'rewards'} and verdict['checks']['reward_model'] == known
    assert known['share_of_ceiling'] > .8 and known['table'][0]['scorer'] == 'model' and set(known['promises']) == {'method', 'raw', 'calibrated'}
    assert known['promises']['calibrated']['ece'] < .1, 'kind and curt are easily told apart'
    rows = {r['reward']: r for r in verdict['rewards']}
    assert set(rows) == {'learned', 'helpfulness', 'safety', 'reference_overlap'} and [r for r in rows if rows[r]['judge']] == ['reference_overlap']
    assert all(r['low'] <= r['difference'] <= r['high'] and r['after'] - r['before'] == pytest.approx(r['difference']) for r in rows.values())
    assert rows['reference_overlap']['before'] == pytest.approx(verdict['before']), 'the judge says here what it says in the verdict'
    last = [json.loads(l) for l in (liked.folder / 'metrics.jsonl').read_text().splitlines()][-1]
    assert {f'rewards/{n}{k}/mean' for n in ('learned', 'helpfulness', 'safety') for k in ('', '/raw', '/calibrated')} <= set(last)
    text = (liked.folder / 'report.html').read_text()
    assert 'Each reward, before and after' in text and 'reference_overlap (judge)' in text and text.count('data:image/png') == (real.folder / 'report.html').read_text().count('data:image/png') + 1
    assert '<script' not in text and '<i>labels' not in text

def test_conversations_with_ratings_are_labels_and_those_people_praised_are_learnt_from(tmp_path, labels):
    said = read_labels(labels)
    assert len(praised_talks(said)) == 80 and all('sorry' in c.messages[-1].text for c in praised_talks(said))
    talks = write_jsonl(tmp_path / 'rated.jsonl', [{'messages': [user(f'Where is {i}?'), agent('There.' if i % 2 else 'Here.')], 'id': f't{i}'} | ({'rating': i % 2} if i % 3 else {}) for i in range(90)])
    rated = read_labels(talks)
    assert len(rated) == 60 and {e.scale for e in rated} == {(0, 1)} and rated[0].group == 't1' and rated[0].prompt[0].text == 'Where is 1?'
    assert f'conversations from {talks}' in plan(mini('x', labels=str(talks)))
    with pytest.raises(DataError, match='none of 1 rows is a label'): read_labels(write_jsonl(tmp_path / 'bare.jsonl', [{'messages': [user('a'), agent('b')]}]))
    with pytest.raises(DataError, match='line 1.*outside its scale'): read_labels(write_jsonl(tmp_path / 'high.jsonl', [{'messages': [user('a'), agent('b')], 'rating': 7}]))
    with pytest.raises(DataError, match='label more'): plan(mini(tmp_path / 'r', conversations=str(talks), labels=str(write_jsonl(tmp_path / 'few.jsonl', [{'messages': [user('a'), agent('b')], 'rating': 4}]))))
    assert not (tmp_path / 'r').exists()

def test_who_was_trained_on_may_not_judge():
    class Unfit(HelpfulnessReward): for_verdict = False
    overlap = ReferenceOverlap()
    check_verdict(overlap, None); check_verdict(overlap, HelpfulnessReward())
    for judge, trained in ((overlap, overlap), (overlap, CompositeReward([HelpfulnessReward(), overlap])), (Unfit(), None)):
        with pytest.raises(ConfigError): check_verdict(judge, trained)

@pytest.mark.parametrize('answer, reference, score', [('', 'a b', 0), ('a b', 'A, b!', 1), ('a a a a', 'a', .4), ('c', 'a', 0), ('a b c d', 'a b', 2 / 3), ('', '', 0), ('größe ☂', 'GRÖSSE größe', 2 / 3)])
def test_overlap_by_hand(answer, reference, score):
    from stateset_nb.core import Scenario
    c = EpisodeContext(Scenario('s', goal={'reference': reference}))
    assert asyncio.run(ReferenceOverlap().compute_reward([Message('user', 'q'), Message('assistant', answer)], c)).score == pytest.approx(score)
    with pytest.raises(DataError, match='reference'): asyncio.run(ReferenceOverlap().compute_reward([Message('assistant', answer)], None))

def test_copying_is_counted_digit_by_digit(desk):
    talks = support_desk_logs(8, 0)
    assert 0 <= copy_accuracy(load_policy(desk.folder / 'clone'), talks) <= 1
    with pytest.raises(DataError, match='no digits'): copy_accuracy(load_policy(desk.folder / 'clone'), [replace(talks[0], messages=(Message('user', '1'), Message('assistant', 'no')))])

def test_held_out_prompts_are_never_learnt(real):
    from stateset_nb.core import read_conversations
    talks = read_conversations(next(Path(json.loads((real.folder / 'run.json').read_text())['config']['conversations']).parent.iterdir()))
    train, test, kept = log_scenarios(talks)
    learnt = {c.messages[:i] for c in kept for i in range(len(c.messages) + 1)}
    assert test and not [s for s in test if s.messages in learnt] and len({s.id for s in (*train, *test)}) == len(train) + len(test)
    assert {r.scenario_id for r in real.tests['trained served'].results} <= {s.id for s in test}

# Killed

def work(config, die=None):
    "A run in a process of its own, which may kill itself before its n-th rename."
    if die is not None:
        n = [die]
        def deadly(f):
            def g(*a, **k):
                n[0] -= 1
                if n[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **k)
            return g
        Path.rename, os.replace = deadly(Path.rename), deadly(os.replace)
    go(config, resume=True)

@pytest.mark.parametrize('what', ['desk', 'logs', 'labels'])
def test_a_killed_run_comes_to_the_same_verdict(forks, tmp_path, logs, labels, what):
    kw, rng = {'desk': {}, 'logs': {'conversations': str(logs)}, 'labels': {'labels': str(labels), 'reward': LEARN}}[what], random.Random(what)
    assert forks(work, mini(tmp_path / 'warm', **kw))[0] == 0
    code, took = forks(work, mini(tmp_path / 'whole', **kw))
    assert code == 0
    renames, killed = rng.sample(range(3, 12), 4), 0
    for k, moments in enumerate([[(None, rng.uniform(.2, .95) * took) for _ in range(3)], [(n, None) for n in renames]]):
        c = mini(tmp_path / f'killed-{k}', **kw)
        for die, seconds in moments:
            code, _ = forks(work, c, die, seconds=seconds)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
        assert forks(work, c)[0] == 0
        whole = tmp_path / 'whole'
        assert (Path(c.out) / 'verdict.json').read_bytes() == (whole / 'verdict.json').read_bytes(), moments
        assert (Path(c.out) / 'policy' / 'model.safetensors').read_bytes() == (whole / 'policy' / 'model.safetensors').read_bytes()
        assert (Path(c.out) / 'trajectories.jsonl').read_bytes() == (whole / 'trajectories.jsonl').read_bytes()
        assert not [p for p in Path(c.out).rglob('.*')], 'what was half written is swept up'
        for f in (Path(c.out) / 'tests').iterdir(): assert TestResults.load(f) == TestResults.load(whole / 'tests' / f.name)
    assert killed >= 3
