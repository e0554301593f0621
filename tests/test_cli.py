"""The command line, as a shell sees it: one clear line for each mistake, nothing half-written, and runs that survive being stopped."""
import json, os, re, signal, subprocess, sys, time
import pytest, yaml
from hypothesis import given, strategies as st
from packaging.requirements import Requirement
from typer.testing import CliRunner
from stateset_nb import cli
from stateset_nb.cli import override_config, read_config
from stateset_nb.core import ConfigError

COMMAND = [sys.executable, '-c', 'from stateset_nb.cli import main; main()']
LOUD = {'FORCE_COLOR', 'CLICOLOR_FORCE', 'GITHUB_ACTIONS', 'STATESET_NB_DEBUG', 'WORLD_SIZE'}

def surroundings(folder, **more):
    return {k: v for k,v in os.environ.items() if k not in LOUD} | {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'COLUMNS': '100', 'STATESET_NB_CACHE': str(folder/'.cache')} | more

def run(folder, *args, **more):
    "What a command of `folder` said."
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, cwd=folder, env=surroundings(folder, **more), timeout=300)

def tree(folder): return {f.relative_to(folder).as_posix(): f.is_file() and f.read_bytes() for f in folder.rglob('*')}

# Small answers

@pytest.mark.parametrize('args', [['version'], ['--version']])
def test_version(tmp_path, args):
    p = run(tmp_path, *args)
    assert (p.returncode, p.stderr)==(0, '') and re.fullmatch(r'stateset-nb \d+\.\d+\.\d+\S*\n', p.stdout)

def test_version_loads_nothing_heavy(tmp_path):
    seen = run(tmp_path, 'version', PYTHONPROFILEIMPORTTIME='1').stderr
    loaded = set(re.findall(r'\| +(\S+)$', seen, re.M))
    assert 'stateset_nb.cli' in loaded and not loaded & {'torch', 'transformers', 'numpy', 'pandas', 'stateset_nb.core'}

def test_help_shows_commands_options_and_examples(tmp_path):
    top, improve = run(tmp_path, '--help'), run(tmp_path, 'improve', '-h')
    assert top.returncode==improve.returncode==0
    assert all(w in top.stdout for w in ('improve', 'doctor', 'version', '--version'))
    assert all(w in improve.stdout for w in ('--conversations', '--model', '--out', '--config', '--seed', '--dry-run', '--resume', 'stateset-nb improve --conversations logs.jsonl'))

def test_help_names_the_true_defaults(tmp_path):
    from stateset_nb.flywheel import ImproveConfig
    said, c = run(tmp_path, 'improve', '--help').stdout, ImproveConfig()
    assert f'(default {c.out})' in said and f'(default {c.seed})' in said and f"'{c.model}' makes" in said

def test_module_is_the_command(tmp_path):
    p = subprocess.run([sys.executable, '-m', 'stateset_nb.cli', 'version'], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert p.stdout==run(tmp_path, 'version').stdout

def test_unknown_command_and_option(tmp_path):
    for args,word in ((['improv'], 'improv'), (['improve', '--sed', '3'], '--sed'), (['improve', '--seed', 'three'], '--seed')):
        p = run(tmp_path, *args)
        assert p.returncode==2 and word in p.stderr and 'Traceback' not in p.stderr

# The doctor

def test_doctor(tmp_path):
    p = run(tmp_path, 'doctor')
    assert p.returncode==0, p.stdout+p.stderr
    assert all(w in p.stdout for w in ('python', 'torch', 'transformers', 'threads', 'CUDA', 'world size', 'cache', '[widgets]')) and 'broken' not in p.stdout
    assert not tree(tmp_path), 'a look writes nothing'

@pytest.mark.parametrize('package', ['no-such-package', 'typer>999'])
def test_doctor_fails_where_something_required_is_broken(monkeypatch, package):
    monkeypatch.setattr(cli, '_requirements', lambda: [(Requirement(package), '')])
    r = CliRunner().invoke(cli.app, ['doctor'])
    assert r.exit_code==1 and 'broken' in r.output and f"pip install '{package}'" in r.output

def test_doctor_forgives_a_missing_extra(monkeypatch):
    monkeypatch.setattr(cli, '_requirements', lambda: [(Requirement('no-such-package'), 'widgets')])
    r = CliRunner().invoke(cli.app, ['doctor'])
    assert r.exit_code==0 and 'lacks no-such-package' in r.output and "pip install 'stateset-nb[widgets]'" in r.output

def test_doctor_sees_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path/'file').write_text('')
    monkeypatch.setattr(cli, '_requirements', list)
    monkeypatch.setenv('STATESET_NB_CACHE', str(tmp_path/'file'/'cache'))
    r = CliRunner().invoke(cli.app, ['doctor'])
    assert r.exit_code==1 and 'STATESET_NB_CACHE' in r.output

def test_doctor_tells_the_world_size(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    assert next(f.seen for f in cli._check_torch() if f.name=='world size')=='2 (rank 1)'

# Settings files

def settings(tmp_path, text, name='c.yaml'):
    f = tmp_path/name
    f.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f

REFUSED = {
    'twice':           ('c.yaml', 'seed: 1\nlogs: 20\nseed: 2\n', "c.yaml line 3: 'seed' stands twice"),
    'twice, below':    ('c.yaml', 'training:\n  beta: 0\n  "beta": 1\n', "c.yaml line 3: 'beta' stands twice"),
    'twice, JSON':     ('c.json', '{"a": {"seed": 1},\n "seed": 1,\n "se\\u0065d": 2}', "c.json line 3: 'seed' stands twice"),
    'broken YAML':     ('c.yml', 'seed: 1\nlogs: [1, 2\n', 'c.yml line 3: not YAML'),
    'broken JSON':     ('c.json', '{"seed": 1,\n "logs": }', 'c.json line 2: not JSON'),
    'NaN':             ('c.json', '{"seed": 1,\n "margin": NaN}', 'c.json line 2: NaN'),
    'infinity':        ('c.json', '{"margin":\n -Infinity}', 'c.json line 2: -Infinity'),
    'YAML type':       ('c.yaml', 'seed: 1\nlogs: !wish 3\n', "c.yaml line 2: the tag '!wish'"),
    'Python object':   ('c.yaml', 'seed: !!python/object/apply:os.mkdir [canary]\n', 'c.yaml line 1: the tag'),
    'known YAML type': ('c.yaml', 'seed: !!int "3"\n', 'c.yaml line 1: the tag'),
    'alias':           ('c.yaml', 'a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n', 'c.yaml line 1: &a'),
    'a key is a list': ('c.yaml', '? [seed]\n: 1\n', 'c.yaml line 1: a key is a list'),
    'two documents':   ('c.yaml', 'seed: 1\n---\nseed: 2\n', 'c.yaml line 2: not YAML'),
    'deep YAML':       ('c.yaml', '['*2000, 'c.yaml line 1: more than'),
    'deep JSON':       ('c.json', '['*200_000, 'c.json line 1: more than'),
    'control sign':    ('c.yaml', 'seed: 1\nout: \x07\n', 'c.yaml line 2: not YAML'),
    'no UTF-8':        ('c.yaml', b'out: \xff\n', 'c.yaml: not UTF-8'),
    'too large':       ('c.yaml', '# '+'x'*(1<<20), 'c.yaml: larger than'),
    'empty':           ('c.yaml', '# nothing\n', 'c.yaml: nothing'),
    'a list':          ('c.json', '[1]', 'c.json: list'),
    'a long number':   ('c.json', '{"seed": '+'9'*5000+'}', 'c.json'),
    'a long number, YAML': ('c.yaml', 'seed: '+'9'*5000, 'c.yaml'),
    'unknown ending':  ('c.toml', 'seed = 1', "the ending '.toml'"),
}

@pytest.mark.parametrize('case', REFUSED)
def test_settings_are_refused_by_line(tmp_path, case):
    name, text, words = REFUSED[case]
    f = settings(tmp_path, text, name)
    with pytest.raises(ConfigError, match=re.escape(words)) as e: read_config(f)
    assert len(str(e.value))<400+len(str(f)) and not (tmp_path/'canary').exists()

def test_a_folder_or_nothing_is_no_settings_file(tmp_path):
    (tmp_path/'d.yaml').mkdir()
    with pytest.raises(ConfigError, match='directory'): read_config(tmp_path/'d.yaml')
    with pytest.raises(ConfigError, match='No such file'): read_config(tmp_path/'e.yaml')

words = st.text('abcdefghijk_ ', min_size=1, max_size=8).map(lambda s: 'x'+s)
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
                     lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=6)

@given(values=st.dictionaries(words, plain, min_size=1, max_size=4))
def test_yaml_reads_what_json_reads(tmp_path_factory, values):
    d = tmp_path_factory.getbasetemp()
    text = json.dumps(values)
    assert read_config(settings(d, text, 'p.json'))==read_config(settings(d, text, 'p.yaml'))==values
    assert read_config(settings(d, json.dumps(values, indent='\t'), 'p.json'))==values
    assert read_config(settings(d, '\ufeff'+text, 'p.json'))==values

@given(x=st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_a_number(tmp_path_factory, x):
    back = read_config(settings(tmp_path_factory.getbasetemp(), f'x: {x!r}', 'f.yaml'))['x']
    assert isinstance(back, float) and back==x

@given(st.text())
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    for name in ('t.yaml', 't.json'):
        f = settings(tmp_path_factory.getbasetemp(), text.encode('utf-8', 'surrogatepass'), name)
        try: assert isinstance(read_config(f), dict)
        except ConfigError as e: assert str(e).startswith(str(f))

def test_the_pyyaml_loader_is_as_it_was():
    assert yaml.safe_load('a: !!int "3"\nb: &x yes\nc: *x')=={'a': 3, 'b': True, 'c': True}

# Settings over defaults

@pytest.fixture(scope='module')
def defaults():
    from stateset_nb.flywheel import ImproveConfig
    return ImproveConfig()

def test_only_what_is_named_changes(defaults):
    c = override_config(defaults, {'training': {'num_episodes': 3}, 'clone': {'steps': 7}}, 'c.yaml').to_dict()
    d = defaults.to_dict()
    assert c['training'].pop('num_episodes')==3!=d['training'].pop('num_episodes')
    assert c['clone'].pop('steps')==7!=d['clone'].pop('steps')
    assert c==d

def test_settings_written_out_are_settings(tmp_path, defaults):
    for text,name in ((json.dumps(defaults.to_dict()), 'c.json'), (yaml.safe_dump(defaults.to_dict()), 'c.yaml')):
        assert override_config(defaults, read_config(settings(tmp_path, text, name)), name)==defaults

WRONG = [({'sed': 1}, "c.yaml has the unknown key 'sed' — did you mean 'seed'?"), ({'training': {'num_episode': 1}}, "c.yaml: training has the unknown key 'num_episode' — did you mean 'num_episodes'?"),
         ({'clone': {'step': 1}}, "c.yaml: clone has the unknown key 'step' — did you mean 'steps'?"), ({'seed': '1'}, "c.yaml: seed='1'"), ({'seed': 1.5}, 'c.yaml: seed=1.5'), ({'seed': True}, 'c.yaml: seed=True'),
         ({'seed': None}, 'c.yaml: seed=None'), ({'model': 3}, 'c.yaml: model=3'), ({'training': {'learning_rate': '5e-6'}}, "c.yaml: training: learning_rate='5e-6'"), ({'training': None}, 'c.yaml: training is None'),
         ({'training': {'scale_rewards': 1}}, 'scale_rewards=1'), ({'margin': 1e999}, 'margin=inf'), ({'margin': 2}, 'c.yaml: margin=2'), ({'training': {'beta': -1}}, 'c.yaml: training: beta=-1'), ({'seed': ['x'*999]}, "seed=['xxx")]

@pytest.mark.parametrize('changes,said', WRONG, ids=lambda v: str(v)[:40] if isinstance(v, dict) else '')
def test_wrong_settings_are_named(defaults, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as e: override_config(defaults, changes, 'c.yaml')
    assert '\n' not in str(e.value) and len(str(e.value))<900

# Mistakes, as a shell shows them

TALK = json.dumps({'messages': [{'role': 'user', 'content': 'Where is it?'}, {'role': 'assistant', 'content': 'On its way.'}]})+'\n'
TALKS = ''.join(TALK.replace('it?', f'order {i}?') for i in range(30))
MISTAKES = {
    'no such log':      ({}, ['--conversations', 'none.jsonl'], ['none.jsonl', 'No such file']),
    'broken line':      ({'logs.jsonl': TALK+TALK+'{"messages": [}\n'}, ['--conversations', 'logs.jsonl'], ['logs.jsonl line 3', 'not JSON']),
    'unknown role':     ({'logs.jsonl': TALK+TALK.replace('user', 'robot')}, ['--conversations', 'logs.jsonl'], ['logs.jsonl line 2', 'messages[0]', "role='robot'", 'assistant']),
    'empty log':        ({'logs.jsonl': ''}, ['--conversations', 'logs.jsonl'], ['logs.jsonl', 'empty']),
    'unknown setting':  ({'c.yaml': 'training:\n  learning_rat: 1e-5\n'}, ['--config', 'c.yaml'], ['c.yaml', "'learning_rat'", "did you mean 'learning_rate'?"]),
    'wrong type':       ({'c.json': '{"scenarios": "many"}'}, ['--config', 'c.json'], ['c.json', "scenarios='many'", 'integer']),
    'out of range':     ({}, ['--seed', '-1'], ['command line: seed=-1']),
    'twice':            ({'c.yaml': 'seed: 1\nseed: 2\n'}, ['--config', 'c.yaml'], ['c.yaml line 2', "'seed'", 'twice']),
    'YAML type':        ({'c.yaml': 'seed: !!python/object/apply:os.mkdir [canary]\n'}, ['--config', 'c.yaml'], ['c.yaml line 1', 'tag']),
    'ending':           ({'c.ini': 'seed = 1\n'}, ['--config', 'c.ini'], ['c.ini', '.yaml']),
    'no settings file': ({}, ['--config', 'c.yaml'], ['c.yaml', 'No such file']),
    'unwritable':       ({'file': ''}, ['--out', 'file/run'], ['file/run', 'cannot write', '--out']),
    'out is a file':    ({'file': ''}, ['--out', 'file'], ['file', 'cannot write', '--out']),
    'desk and model':   ({}, ['--model', 'some/model'], ["'some/model'", 'tiny']),
    'no such folder':   ({'logs.jsonl': TALKS}, ['--conversations', 'logs.jsonl', '--model', './none'], ["'./none'"]),
    'no such model':    ({'logs.jsonl': TALKS}, ['--conversations', 'logs.jsonl', '--model', 'no-such/model'], ["'no-such/model'"]),
}

@pytest.mark.parametrize('case', MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, case):
    files, args, words = MISTAKES[case]
    for name,text in files.items(): (tmp_path/name).write_text(text)
    before = tree(tmp_path)
    p = run(tmp_path, 'improve', *args)
    assert p.returncode==1, p.stdout+p.stderr
    assert re.fullmatch(r'error: [^\n]+\n', p.stderr) and all(w in p.stderr for w in words), p.stderr
    assert 'Traceback' not in p.stdout+p.stderr
    assert tree(tmp_path)==before

def test_the_traceback_is_there_for_who_asks(tmp_path):
    p = run(tmp_path, 'improve', '--config', 'none.yaml', STATESET_NB_DEBUG='1')
    assert p.returncode==1 and 'Traceback' in p.stderr and 'locals' not in p.stderr and 'none.yaml: No such file' in ' '.join(p.stderr.split())

# Dry runs

def test_a_dry_run_writes_nothing_and_options_win(tmp_path):
    settings(tmp_path, 'seed: 3\nout: there\nconversations: logs.jsonl\ntraining: {learning_rate: 5e-6}\n')
    (tmp_path/'logs.jsonl').write_text(TALKS)
    before = tree(tmp_path)
    p = run(tmp_path, 'improve', '--config', 'c.yaml', '--seed', '4', '--dry-run')
    assert p.returncode==0 and not p.stderr
    assert 'learning_rate 5e-06' in p.stdout and 'logs.jsonl' in p.stdout and 'into there' in p.stdout and 'seed 4' in p.stdout
    assert tree(tmp_path)==before

# Runs that are stopped

SMALL = """logs: 60
practice: 40
scenarios: 6
filtered_steps: 10
clone: {steps: 20, hidden_size: 32}
training: {num_episodes: 12, prompts_per_step: 2, num_generations: 2, save_steps: 1}
"""
TOLD = ('verdict.json', 'policy/model.safetensors')

def metrics(folder): return [{k: v for k,v in json.loads(s).items() if not k.startswith('time/')} for s in (folder/'metrics.jsonl').read_text().splitlines()]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder of a run that nobody stopped."
    d = tmp_path_factory.mktemp('whole')
    settings(d, SMALL)
    p = run(d, 'improve', '--config', 'c.yaml', '--out', 'run')
    assert p.returncode==0, p.stdout+p.stderr
    return d, p.stdout

def test_a_run_says_its_verdict(whole):
    folder, said = whole
    v = json.loads((folder/'run'/'verdict.json').read_text())
    assert f'verdict: {v["verdict"].replace("_", " ")}\n' in said and v['sentence'] in said and 'run/report.html' in said
    assert {'report.html', 'verdict.json', 'run.json', 'metrics.jsonl', 'trajectories.jsonl', 'policy'}<={f.name for f in (folder/'run').iterdir()}

def test_a_folder_is_not_overwritten(whole):
    folder, _ = whole
    before = tree(folder)
    for more,words in (([], ['run', '--resume']), (['--resume', '--seed', '5'], ['another seed'])):
        p = run(folder, 'improve', '--config', 'c.yaml', '--out', 'run', *more)
        assert p.returncode==1 and all(w in p.stderr for w in words) and 'Traceback' not in p.stderr
    assert tree(folder)==before

def stop(folder, how, mark):
    "Start a run, and send a signal to it and to whatever it started when a file appears."
    p = subprocess.Popen([*COMMAND, 'improve', '--config', 'c.yaml', '--out', 'run'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=surroundings(folder), start_new_session=True)
    while p.poll() is None and not (folder/'run'/mark).exists(): time.sleep(.005)
    if p.poll() is None: os.killpg(p.pid, how)
    out, err = p.communicate(timeout=120)
    assert not (folder/'run'/'verdict.json').exists(), f'it was over before it could be stopped: {out}{err}'
    return p.returncode, err

def stays_the_same(folder, whole):
    "Take the run up, and compare it with the one that nobody stopped."
    p = run(folder, 'improve', '--config', 'c.yaml', '--out', 'run', '--resume')
    assert p.returncode==0, p.stdout+p.stderr
    for f in TOLD: assert (folder/'run'/f).read_bytes()==(whole/'run'/f).read_bytes(), f
    assert metrics(folder/'run')==metrics(whole/'run')

@pytest.mark.parametrize('mark', ['run.json', 'checkpoint-1'])
def test_ctrl_c_says_how_to_go_on_and_going_on_ends_the_same(tmp_path, whole, mark):
    settings(tmp_path, SMALL)
    code, err = stop(tmp_path, signal.SIGINT, mark)
    assert code==130 and 'Traceback' not in err
    assert 'go on with: stateset-nb improve --resume --out run --config c.yaml' in err
    stays_the_same(tmp_path, whole[0])

@pytest.mark.parametrize('mark', ['clone/policy.json', 'checkpoint-2'])
def test_a_killed_run_is_taken_up_and_ends_the_same(tmp_path, whole, mark):
    settings(tmp_path, SMALL)
    code, _ = stop(tmp_path, signal.SIGKILL, mark)
    assert code==-signal.SIGKILL
    stays_the_same(tmp_path, whole[0])
