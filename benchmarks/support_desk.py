"""The demo over seeds: what cloning, filtering the logs and practice reach on the built-in support desk, and at what cost.

    python benchmarks/support_desk.py              # every seed, and the settings with plentiful logs
    python benchmarks/support_desk.py --seeds 1    # one seed; results are merged with those that are there
    python benchmarks/support_desk.py --quick      # one seed at a third of the demo's settings, for `make bench`
    python benchmarks/support_desk.py --smoke      # tiny settings: does it run at all?

Every stage is kept under runs/bench, so an interrupted bench goes on at the stage it was in. The full bench writes
benchmarks/results/support_desk.{json,md,png}; --quick and --smoke write to benchmarks/results/tmp.

CPU seconds are those of the process, over all its threads (time.process_time). The *rival of equal compute* clones the
successful logs for at least as many CPU seconds as cloning all logs and practice took together: the seconds a step takes are
measured on a short run, the steps are chosen with a quarter to spare, and the clone is made again with more if it fell short.
"""
import argparse, asyncio, json, os, platform, shutil, sys, time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers

import stateset_nb
from stateset_nb import flywheel
from stateset_nb.core import content_hash, stream, write_text
from stateset_nb.environments import SupportDesk, desk_scenarios, support_desk_logs
from stateset_nb.evaluation import TestResults
from stateset_nb.flywheel import ImproveConfig, RunFolder, improve, policy_results
from stateset_nb.policy import load_policy, save_policy, tiny_policy
from stateset_nb.stats import compare_paired

HERE = Path(__file__).parent
RARE = 'refund: escalate ($100 or more)'
SETTINGS = {'few logs': {}, 'plentiful logs': {'logs': 20_000}, 'very plentiful logs': {'logs': 40_000}}  # what differs from the demo's defaults
WHO = {'logs': 'the clerks themselves', 'clone': 'clone of all logs', 'filtered': "clone of successful logs, the demo's steps",
       'equal': 'clone of successful logs, equal compute', 'trained': 'clone of all logs, then practice'}
HOW = {'sampled': 1., 'served': 0.}  # temperature

def settings(mode: str, setting: str, seed: int) -> ImproveConfig:
    "The demo's defaults; smaller for the quick modes."
    c = replace(ImproveConfig(), seed=seed, **SETTINGS[setting])
    if mode == 'full': return c
    if mode == 'quick':
        return replace(c, scenarios=100, filtered_steps=c.filtered_steps // 3, clone=replace(c.clone, steps=c.clone.steps // 3),
                       training=replace(c.training, num_episodes=c.training.num_episodes // 3))
    return replace(c, logs=c.logs // 10, practice=50, scenarios=20, filtered_steps=10, clone=replace(c.clone, steps=12, hidden_size=32),
                   training=replace(c.training, num_episodes=2, prompts_per_step=4, num_generations=4))

def about(c: ImproveConfig) -> dict:
    "The settings of a run, without where and with which seed."
    return {k: v for k, v in c.to_dict().items() if k not in ('out', 'seed')}

def known_as(then: dict, now: dict) -> bool:
    "Were these settings what they are now? A setting that did not exist then is at its default now."
    return all(known_as(v, now.get(k, {})) if isinstance(v, dict) else k in now and now[k] == v for k, v in then.items())

def data_hash(c: ImproveConfig) -> str:
    "A name for what the desk hands out: another draw of logs or scenarios makes old results stale."
    return content_hash([[t.to_dict() for t in support_desk_logs(50, c.seed)], [s.to_dict() for s in desk_scenarios(20, stream(c.seed, 'test'), 'test')]], 6)

# ---- running

class ClockedFolder(RunFolder):
    "A run's folder that notes CPU seconds beside the wall's."
    def start(self) -> None: self.mark = time.process_time()

    def policy(self, name, make):
        self.start()
        return super().policy(name, make)

    async def results(self, name, play):
        self.start()
        return await super().results(name, play)

    def finish(self, name, seconds):
        cpu = self.state.setdefault('cpu_seconds', {})
        cpu[name] = round(time.process_time() - self.mark, 1)
        self.start()
        super().finish(name, seconds)

def run_demo(c: ImproveConfig) -> dict[str, dict[str, float]]:
    "The demo in one folder; its seconds by stage. A stage that was interrupted is begun again, so that its time is whole."
    folder = Path(c.out)
    note = folder / 'stages.json'
    if note.is_file(): return json.loads(note.read_text())
    if not (folder / 'policy' / 'policy.json').is_file():
        for p in folder.glob('checkpoint-*'): shutil.rmtree(p)
    read = lambda: json.loads((folder / 'run.json').read_text()) if (folder / 'run.json').is_file() else {'seconds': {}, 'cpu_seconds': {}}
    before, wall, cpu = read(), time.perf_counter(), time.process_time()
    with patch.object(flywheel, 'RunFolder', ClockedFolder): asyncio.run(improve(c, resume=True))
    wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, read()
    spent = lambda k: sum(after[k].values()) - sum(before[k].values())
    stages = {k: {'wall_s': v, 'cpu_s': after['cpu_seconds'][k]} for k, v in after['seconds'].items()}
    stages['the rest'] = {'wall_s': round(max(0, wall - spent('seconds')), 1), 'cpu_s': round(max(0, cpu - spent('cpu_seconds')), 1)}  # logs, checks, report
    write_text(note, json.dumps(stages))
    return stages

def equal_compute(c: ImproveConfig, folder: Path, need: float) -> dict:
    "The clone of the successful logs that spends at least `need` CPU seconds: its steps and its cost."
    note = folder / 'equal.json'
    if note.is_file(): return json.loads(note.read_text())
    good = [t for t in support_desk_logs(c.logs, c.seed) if t.metadata['success']]
    def make(steps):
        began, wall, marks = time.process_time(), time.perf_counter(), []
        policy = tiny_policy(good, c.seed, replace(c.clone, steps=steps), cache=False, on_step=lambda i, loss: marks.append(time.process_time()))
        return policy, marks[0] - began, (marks[-1] - marks[0]) / (steps - 1), time.process_time() - began, time.perf_counter() - wall
    _, fixed, each, _, _ = make(40)
    steps, tries = 40, 0
    while True:
        steps, tries = max(steps + 1, int(1.25 * (need - fixed) / each)), tries + 1
        print(f'cloning the {len(good)} successful logs for {steps} steps (equal compute: {need:.0f} CPU seconds)', flush=True)
        policy, fixed, each, cpu, wall = make(steps)
        if cpu >= need or tries == 4: break
    save_policy(policy, folder / 'equal')
    res = {'steps': steps, 'wall_s': round(wall, 1), 'cpu_s': round(cpu, 1), 'cpu_s_needed': round(need, 1), 'successful_logs': len(good)}
    write_text(note, json.dumps(res))
    return res

def load_tests(c: ImproveConfig) -> dict[str, TestResults]:
    "Everybody's held-out episodes; those of the rival of equal compute are played here."
    folder = Path(c.out)
    keys = ['logs', *(f'{who} {how}' for who in list(WHO)[1:] for how in HOW)]
    files = {k: folder / 'tests' / f'{k.replace(" ", "-")}.jsonl' for k in keys}
    tests = {k: TestResults.load(f) for k, f in files.items() if f.is_file()}
    scenarios = desk_scenarios(c.scenarios, stream(c.seed, 'test'), 'test')
    for how, temperature in HOW.items():
        if f'equal {how}' in tests: continue
        policy = load_policy(folder / 'equal', 'cpu')
        t = asyncio.run(policy_results(policy, f'{WHO["equal"]}, {how}', SupportDesk(), scenarios, temperature, c.training.max_completion_length, stream(c.seed, 'test')))
        t.save(folder / 'tests' / f'equal-{how}.jsonl')
        tests[f'equal {how}'] = t
    if len({t.scenario_set for t in tests.values()}) != 1: sys.exit(f'{folder}: the tests were played on different scenarios — remove the folder and start again')
    return tests

def interval(i) -> dict | None: return None if i is None else {'value': round(i.value, 4), 'low': round(i.low, 4), 'high': round(i.high, 4), 'n': i.n}

def rows_of(tests: dict[str, TestResults]) -> list[dict]:
    "One row for each of the table's lines."
    res = []
    for k, t in tests.items():
        who, _, how = k.partition(' ')
        res.append({'who': who, 'how': how, 'success': interval(t.success), 'rare_rule': interval(t.by('situation').get(RARE)),
                    'by_difficulty': {d: interval(i) for d, i in t.by().items()}})
    return res

def compare(tests: dict[str, TestResults], before: str, after: str, margin: float) -> dict:
    p = compare_paired(tests[before].outcomes(), tests[after].outcomes(), margin=margin)
    return {'before': before, 'after': after, 'difference': round(p.difference, 4), 'low': round(p.low, 4), 'high': round(p.high, 4), 'verdict': p.verdict, 'n': p.n}

def measure(mode: str, setting: str, seed: int, work: Path) -> dict:
    "Everything about one seed of one setting."
    c = settings(mode, setting, seed)
    c = replace(c, out=str(work / mode / f'{setting.replace(" ", "-")}-{seed}-{content_hash(about(c), 6)}-{data_hash(c)}'))
    folder, load = Path(c.out), os.getloadavg()[0]
    kept = folder / 'bench.json'
    if kept.is_file(): return json.loads(kept.read_text())
    print(f'== {setting}, seed {seed}: {folder}', flush=True)
    stages = run_demo(c)
    rival = equal_compute(c, folder, stages['clone']['cpu_s'] + stages['practice']['cpu_s'])
    tests = load_tests(c)
    verdict = json.loads((folder / 'verdict.json').read_text())
    others = [k for k in tests if not k.startswith('trained')]
    pairs = [('clone sampled', 'trained sampled')] + [(k, f'trained {h}') for h in HOW for k in others if k in ('logs', f'{k.split()[0]} {h}') and (k, h) != ('clone sampled', 'sampled')]
    res = {'schema': 1, 'mode': mode, 'setting': setting, 'seed': seed, 'date': time.strftime('%Y-%m-%d'), 'machine': machine() | {'load_before': round(load, 1), 'load_after': round(os.getloadavg()[0], 1)},
           'threads': torch.get_num_threads(), 'versions': versions(), 'settings': about(c), 'data': data_hash(c), 'margin': c.margin, 'log_success': log_success(c),
           'stages': stages, 'equal_compute': rival, 'copies_numbers': round(verdict['checks']['copies_numbers'], 4),
           'clone_minus_logs': round(verdict['checks']['clone_minus_logs'], 4), 'rows': rows_of(tests), 'comparisons': [compare(tests, a, b, c.margin) for a, b in pairs],
           'filter_against_practice': [compare(tests, f'trained {h}', f'equal {h}', c.margin) for h in HOW]}
    write_text(kept, json.dumps(res, indent=1))
    return res

def log_success(c: ImproveConfig) -> dict:
    "How many logs there are, how many of them went right, and how often the rare rule was due and followed."
    logs = support_desk_logs(c.logs, c.seed)
    rare = [r['success'] for t in logs for r in t.metadata['requests'] if r['situation'] == RARE]
    return {'logs': len(logs), 'successful': sum(t.metadata['success'] for t in logs), 'rare_rule_due': len(rare), 'rare_rule_followed': sum(rare)}

def machine() -> dict:
    info = Path('/proc/cpuinfo')
    names = [l.split(':', 1)[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.is_file() else []
    return {'cpu': names[0] if names else platform.processor() or platform.machine(), 'cores': os.cpu_count(), 'system': platform.system()}

def versions() -> dict: return {'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__, 'numpy': np.__version__, 'stateset_nb': stateset_nb.__version__}

# ---- judging

def find(record: dict, who: str, how: str = '') -> dict: return next((r for r in record['rows'] if (r['who'], r['how']) == (who, how)), {})

def difference(record: dict, before: str, after: str) -> dict: return next(p for p in record['comparisons'] if (p['before'], p['after']) == (before, after))

def points(p: dict) -> str: return f'{100 * p["difference"]:+.1f} [{100 * p["low"]:+.1f}, {100 * p["high"]:+.1f}]'

def demo_seconds(record: dict, kind: str) -> float: return sum(s[f'{kind}_s'] for s in record['stages'].values())

def checks_of(record: dict) -> dict[str, tuple[bool, str]]:
    "The demands on one seed: name -> (met, what was seen)."
    gain, served = difference(record, 'clone sampled', 'trained sampled'), find(record, 'trained', 'served')
    rivals = [p for p in record['comparisons'] if p['after'] == 'trained served']
    rare = served['rare_rule']
    wall, cpu, rival = demo_seconds(record, 'wall'), demo_seconds(record, 'cpu'), record['equal_compute']
    return {
        'gain of practice, sampled: at least +35 points, lower end above +25': (gain['difference'] >= .35 and gain['low'] > .25, points(gain)),
        'success as served: at least 90 %': (served['success']['value'] >= .9, f'{100 * served["success"]["value"]:.1f} %'),
        'better than each rival as served: interval above 0': (all(p['low'] > 0 for p in rivals), '; '.join(f'{p["before"]} {points(p)}' for p in rivals)),
        f'rare rule ({RARE}) as served: at least 90 %': (rare is not None and rare['value'] >= .9, 'none in the test' if rare is None else f'{100 * rare["value"]:.1f} % of {rare["n"]}'),
        'clone within 5 points of its logs, sampled': (abs(record['clone_minus_logs']) <= .05, f'{100 * record["clone_minus_logs"]:+.1f}'),
        'digits copied right: at least 95 %': (record['copies_numbers'] >= .95, f'{100 * record["copies_numbers"]:.1f} %'),
        'the demo takes at most 8 CPU minutes': (cpu <= 480, f'{cpu / 60:.1f} min on {record["threads"]} thread{"s" * (record["threads"] > 1)} (wall {wall / 60:.1f} min, load {record["machine"]["load_before"]} to {record["machine"]["load_after"]})'),
        'the rival of equal compute had as many CPU seconds as clone and practice': (rival['cpu_s'] >= rival['cpu_s_needed'], f'{rival["cpu_s"]:.0f} of {rival["cpu_s_needed"]:.0f} s, {rival["steps"]} steps'),
    }

def judge(records: Sequence[dict]) -> list[dict]:
    "Every check with every seed; a check is met when each seed meets it."
    res: list[dict] = []
    for setting in SETTINGS:
        mine = {r['seed']: r for r in records if r['setting'] == setting}
        if not mine: continue
        found = {s: checks_of(r) if setting == 'few logs' else plentiful_check(r) for s, r in mine.items()}
        for name in next(iter(found.values())):
            seeds = {str(s): {'met': f[name][0], 'seen': f[name][1]} for s, f in found.items()}
            res.append({'setting': setting, 'check': name, 'met': all(v['met'] for v in seeds.values()), 'seeds': seeds})
    return res

def plentiful_check(record: dict) -> dict[str, tuple[bool, str]]:
    "Where logs are plentiful, is filtering them enough?"
    p = next(p for p in record['filter_against_practice'] if p['before'] == 'trained served')
    return {f'filtering the logs is enough: as served, equal compute, no more than {100 * record["margin"]:.0f} points below practice':
            (p['verdict'] in ('better', 'not_worse'), f'filtered minus practised {points(p)}, {p["verdict"].replace("_", " ")}')}

# ---- telling

def rate(i: dict | None) -> str: return '-' if i is None else f'{100 * i["value"]:.1f} [{100 * i["low"]:.0f}, {100 * i["high"]:.0f}]'

def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---'] * len(head), *rows])

def stage_table(records: Sequence[dict]) -> str:
    "Seconds by stage, wall and CPU."
    groups = {'clone all logs': ['clone'], 'practice': ['practice'], "clone successful logs (the demo's rival)": ['filtered']}
    rows = []
    for r in records:
        used = {k: [s for s in names if s in r['stages']] for k, names in groups.items()}
        used |= {'held-out tests': [s for s in r['stages'] if s.startswith('test')], 'the rest': ['the rest']}
        cells = [' / '.join(f'{sum(r["stages"][s][k] for s in names):.0f}' for k in ('wall_s', 'cpu_s')) for names in (*used.values(), r['stages'])]
        rows.append([f'{r["setting"]}, {r["seed"]}', *cells, f'{r["equal_compute"]["wall_s"]:.0f} / {r["equal_compute"]["cpu_s"]:.0f} ({r["equal_compute"]["steps"]} steps)'])
    return table(['setting, seed', *groups, 'held-out tests', 'logs, checks, report', 'the demo in all', 'rival of equal compute'], rows)

def span(values: Sequence[float]) -> str:
    "Shares as per cent, from the least to the most."
    lo, hi = (f'{100 * f(values):.1f}' for f in (min, max))
    return lo if lo == hi else f'{lo} to {hi}'

def reading_of(setting: str, mine: Sequence[dict]) -> str:
    "One setting in sentences."
    values = {(w, h): span([find(r, w, h)['success']['value'] for r in mine]) for w in WHO for h in ([''] if w == 'logs' else HOW) if find(mine[0], w, h)}
    gain, n, logs = span([difference(r, 'clone sampled', 'trained sampled')['difference'] for r in mine]), mine[0]['rows'][0]['success']['n'], mine[0]['log_success']
    res = (f'**{setting.capitalize()}** ({logs["logs"]} conversations, {logs["successful"]} of them right and the rare rule followed in {logs["rare_rule_followed"]} of {logs["rare_rule_due"]} cases at seed {mine[0]["seed"]}; '
           f'{len(mine)} seed{"s" * (len(mine) > 1)}, {n} held-out scenarios each). The clerks reach {values["logs", ""]} %, a clone of all logs {values["clone", "sampled"]} % sampled and {values["clone", "served"]} % as served. '
           f'Practice changes the sampled rate by {gain} points and ends at {values["trained", "sampled"]} % sampled, {values["trained", "served"]} % as served. '
           f'Cloning only the successful logs for the same CPU time ends at {values["equal", "sampled"]} % sampled, {values["equal", "served"]} % as served.')
    if setting == 'few logs': return res
    seen = [p for r in mine for p in r['filter_against_practice'] if p['before'] == 'trained served']
    enough = all(p['verdict'] in ('better', 'not_worse') for p in seen)
    return (res + (' Here filtering the logs is enough, and it is the simpler thing to do.' if enough else ' We expected filtering to be enough here; these figures do not show it.')
            + ' Filtered minus practised, as served: ' + '; '.join(f'{points(p)} points ({p["verdict"].replace("_", " ")})' for p in seen) + '.')

def reading(doc: dict) -> list[str]:
    "What the figures say, in sentences made from them."
    by = {s: [r for r in doc['records'] if r['setting'] == s] for s in SETTINGS}
    bad = [c for c in doc['checks'] if not c['met']]
    last = 'Not met: ' + '; '.join(f'{c["check"]} ({c["setting"]}, seed {", ".join(s for s, v in c["seeds"].items() if not v["met"])})' for c in bad) + '.'
    return [reading_of(s, mine) for s, mine in by.items() if mine] + [last if bad else 'Every check is met by every seed that was run.']

def markdown(doc: dict) -> str:
    "The results as a page."
    records = doc['records']
    small = {'quick': 'A third of the demo\'s settings on one seed', 'smoke': 'Tiny settings that only show that the bench runs'}.get(doc['mode'])
    first = records[0]
    rows = [[r['setting'], r['seed'], WHO[x['who']], x['how'], rate(x['success']), rate(x['rare_rule'])] for r in records for x in r['rows']]
    pairs = [[r['setting'], r['seed'], p['before'], p['after'], points(p), p['verdict'].replace('_', ' ')] for r in records
             for p in [*r['comparisons'], *(r['filter_against_practice'] if r['setting'] != 'few logs' else [])]]
    levels = list(first['rows'][0]['by_difficulty'])
    steps = [[r['setting'], r['seed'], WHO[x['who']], *(f'{100 * x["by_difficulty"][d]["value"]:.0f}' for d in levels)] for r in records for x in r['rows'] if x['how'] == 'served' or x['who'] == 'logs']
    checks = [[c['setting'], c['check'], '; '.join(f'seed {s}: {v["seen"]}' for s, v in c['seeds'].items()), 'met' if c['met'] else '**NOT met**'] for c in doc['checks']]
    machines = sorted({f'{r["date"]}: {r["machine"]["cpu"]}, {r["machine"]["cores"]} cores, load {r["machine"]["load_before"]} before and {r["machine"]["load_after"]} after; {r["threads"]} threads; '
                       + ', '.join(f'{k} {v}' for k, v in r['versions'].items()) for r in records})
    return '\n\n'.join([
        '# The support desk over seeds', *([f'*{small}: these are not the figures of the demo.*'] if small else []), *reading(doc),
        'Success in % of held-out scenarios, each with its 95 % interval. *Sampled* is temperature 1, as it practised; *served* takes the likeliest token. '
        f'*Rare rule* is the share of requests "{RARE}" that were served right.', '![Success with intervals](support_desk.png)',
        table(['setting', 'seed', 'who', 'read out', 'success', 'rare rule'], rows),
        '## By difficulty', 'Success as served, in %, by the number of requests in a conversation. A long conversation is rarely right throughout, so filtering leaves few of them to learn from.',
        table(['setting', 'seed', 'who', *levels], steps),
        '## Differences', 'Paired over the same scenarios, in points: after minus before, 95 % interval.', table(['setting', 'seed', 'before', 'after', 'points', 'verdict'], pairs),
        '## Checks', table(['setting', 'check', 'seen', ''], checks),
        '## Cost', 'Seconds, wall / CPU over all threads. The rival of equal compute has at least the CPU seconds of cloning all logs and practice together.', stage_table(records),
        table(['setting, seed', 'digits copied right', 'clone minus clerks, sampled'], [[f'{r["setting"]}, {r["seed"]}', f'{100 * r["copies_numbers"]:.1f} %', f'{100 * r["clone_minus_logs"]:+.1f} points'] for r in records]),
        '## Made with', '\n'.join(f'- {m}' for m in machines), f'Settings: `{json.dumps(first["settings"])}`'
        + ''.join(f'; {s}: {d}' for s, d in SETTINGS.items() if d and s in {r['setting'] for r in records}) + '. Made by `benchmarks/support_desk.py`.']) + '\n'

def plot(doc: dict, path: Path) -> None:
    "Success with intervals: a panel for each setting and read-out, a mark for each seed."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    names = [s for s in SETTINGS if any(r['setting'] == s for r in doc['records'])]
    fig = Figure(figsize=(10, .6 + 2.2 * len(names)), layout='constrained', dpi=110)
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(names), 2, sharex=True, sharey=True, squeeze=False)
    for (i, setting), (j, how) in ((a, b) for a in enumerate(names) for b in enumerate(HOW)):
        ax, mine = axes[i][j], [r for r in doc['records'] if r['setting'] == setting]
        for k, r in enumerate(mine):
            v = [(y, find(r, w, '' if w == 'logs' else how)) for y, w in enumerate(WHO)]
            got = [(y, row['success']) for y, row in v if row]
            at = [y + (k - (len(mine) - 1) / 2) * .22 for y, _ in got]
            x = np.array([[100 * s['value'], 100 * (s['value'] - s['low']), 100 * (s['high'] - s['value'])] for _, s in got]).T
            ax.errorbar(x[0], at, xerr=x[1:], fmt='o', ms=4, capsize=3, label=f'seed {r["seed"]}')
        ax.set(yticks=range(len(WHO)), yticklabels=list(WHO.values()), xlim=(0, 101), title=f'{setting}, {how}', ylim=(len(WHO) - .5, -.5))
        ax.axvline(90, color='#999', lw=.8, ls=':')
        if i == len(names) - 1: ax.set_xlabel('success (% of held-out scenarios), 95 % intervals')
        if not i and not j and len(mine) > 1: ax.legend(frameon=False, fontsize=8, loc='lower right')
    tmp = path.with_suffix('.part.png')
    fig.savefig(tmp, metadata={'Software': None})
    tmp.replace(path)

def collect(mode: str, new: Sequence[dict], folder: Path) -> dict:
    "What was measured now, with what stands in the results already; another setting of the demo makes old results stale."
    f = folder / 'support_desk.json'
    old = json.loads(f.read_text())['records'] if f.is_file() else []
    now = {(r['setting'], r['seed']): r for r in new}
    for r in old:
        c = settings(mode, r['setting'], r['seed']) if r['setting'] in SETTINGS else None
        if c is None or (r['mode'], r['data']) != (mode, data_hash(c)) or not known_as(r['settings'], about(c)): print(f'the result of {r["setting"]}, seed {r["seed"]} was made with other settings or another desk, and is dropped')
        else: now.setdefault((r['setting'], r['seed']), r)
    order = list(SETTINGS)
    records = sorted(now.values(), key=lambda r: (order.index(r['setting']), r['seed']))
    return {'schema': 1, 'benchmark': 'support_desk', 'mode': mode, 'records': records, 'checks': judge(records)}

def write(doc: dict, folder: Path) -> None:
    "JSON, page and picture."
    folder.mkdir(parents=True, exist_ok=True)
    plot(doc, folder / 'support_desk.png')
    write_text(folder / 'support_desk.md', markdown(doc))
    write_text(folder / 'support_desk.json', json.dumps(doc, indent=1))

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help="one seed at a third of the demo's settings")
    p.add_argument('--smoke', action='store_true', help='tiny settings')
    p.add_argument('--seeds', help='comma between, e.g. 0,1,2; one seed in the quick mode unless given')
    p.add_argument('--settings', default=None, help=f'comma between: {", ".join(SETTINGS)}')
    p.add_argument('--work', type=Path, default=HERE.parent / 'runs' / 'bench', help='where the stages are kept')
    p.add_argument('--results', type=Path, help='folder of the results')
    a = p.parse_args()
    mode = 'smoke' if a.smoke else 'quick' if a.quick else 'full'
    wanted = a.settings.split(',') if a.settings else ['few logs'] if mode == 'quick' else list(SETTINGS)
    if odd := set(wanted) - set(SETTINGS): p.error(f'--settings {", ".join(sorted(odd))} — expected {", ".join(SETTINGS)}')
    seeds = [int(s) for s in (a.seeds or ('0' if mode == 'quick' else '0,1,2')).split(',')]
    results = a.results or HERE / 'results' / ('' if mode == 'full' else 'tmp')
    for setting in wanted:
        for seed in seeds if setting == 'few logs' else seeds[:1] if a.settings or 0 in seeds else []:  # the others: one seed
            doc = collect(mode, [measure(mode, setting, seed, a.work)], results)
            write(doc, results)
    print('\n'.join(['', *reading(doc), '']))
    for c in doc['checks']: print(('met      ' if c['met'] else 'NOT met  ') + c['check'] + ' | ' + '; '.join(f'seed {s}: {v["seen"]}' for s, v in c['seeds'].items()))
    print(f'\n{results}/support_desk.json, .md, .png')

if __name__ == '__main__': main()
