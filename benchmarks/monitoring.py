"""What monitoring costs, and what its detectors see.

    python benchmarks/monitoring.py             # both parts (about six minutes of CPU time); writes benchmarks/results/monitoring.{json,md}
    python benchmarks/monitoring.py --quick     # few seeds, short loops: does it run? writes to benchmarks/results/tmp
    python benchmarks/monitoring.py --part cost # one part; the other is kept from the last results

**Detectors.** A small policy that clones replies of one to six words is trained by `SingleTurnGRPOTrainer` on six questions; in round 22 something is broken, in the run itself and not in its
numbers (the one exception is said in the table: our trainers stop at a NaN by themselves, so it is written into the metrics, as TRL logs it). A fault is seen when its detector fires within 20
rounds. Every alert in a healthy run, and every one before round 22, is a false page; up to there the runs of a
seed are mostly the same, so one event may count in several of them. The limits in `DETECTORS` were set on one half of the seeds: at the geometric mean of the strongest
signal of healthy runs and the weakest of the fault, rounded (half of the weakest where healthy runs give none); those that say yes or no, and the share of groups that agree, keep limits of
their meaning, and that of entropy is set higher, since a small policy that learns fast halves it in good health.
Reported is what they do on the other half, which was run after limits and signals were settled and changed neither.

**Cost.** Process CPU time, the best of several repeats; single calls of `log_metric` by the wall clock, since a page that waits is what hurts.
"""
import argparse, asyncio, copy, json, math, os, platform, random, tempfile, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import stateset_nb
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import Conversation, Message, Scenario, write_text
from stateset_nb.environments import ConversationEnvironment, rollouts
from stateset_nb.monitoring import DETECTORS, AdvancedDashboard, AlertManager, DetectorPack, MetricAggregator, MetricsFile
from stateset_nb.policy import TinyConfig, tiny_policy
from stateset_nb.rewards import RewardFunction, RewardResult, reward_function
from stateset_nb.trainers import SingleTurnGRPOTrainer, TrainingConfig

HERE = Path(__file__).parent
ASK, SAY = 'parcel refund code order invoice address'.split(), 'sent paid lost sorry thanks prima'.split()
ROUNDS, BREAK, WITHIN = 42, 22, 20
HEALTHY = {'plain': {'beta': 0.}, 'with KL': {}, 'fast, unscaled': {'learning_rate': 2e-3, 'scale_rewards': False}}

# ---- detectors

def clerk():
    "A policy that says a few words of six."
    r = random.Random(0)
    talks = [Conversation((Message('user', a), Message('assistant', ' '.join(r.choice(SAY) for _ in range(r.choice((2, 3, 3, 4, 4, 5)))))), id=f'{a}-{i}') for a in ASK for i in range(40)]
    return tiny_policy(talks, config=TinyConfig(400, 12, hidden_size=32, layers=1, max_tokens=128, short_first=0.), cache=False)

class Desk:
    "One run: a trainer, and a reward that can go wrong."
    def __init__(self, policy, seed, **settings):
        self.paid = self.right
        self.policy = copy.deepcopy(policy)
        self.config = TrainingConfig(**dict(num_episodes=ROUNDS, prompts_per_step=6, num_generations=6, max_completion_length=16, learning_rate=1e-3, beta=.02, seed=seed, eval_steps=2) | settings)
        desk = self
        class Paid(RewardFunction):
            "Any number, not only scores."
            async def compute_reward(self, turns, context=None): return RewardResult(desk.right(turns), reward=desk.paid(turns))
        @reward_function
        def held(turns): return self.right(turns)
        self.env = ConversationEnvironment([Scenario(a, (Message('user', a),)) for a in ASK])
        async def evaluate(agent):
            groups = await rollouts(agent, self.env, self.env.scenarios, 10, 10_000 + self.trainer.step, held, 256, max_turns=1)
            return {'success': float(np.mean([r for g in groups for r in g.rewards]))}
        self.trainer = SingleTurnGRPOTrainer(Agent(AgentConfig('clerk'), PolicyBackend(self.policy)), self.env, Paid(), self.config, evaluate=evaluate)

    @staticmethod
    def right(turns):
        "Share of right words; which those are depends on the question."
        words = turns[-1].text.split()
        return sum(w == SAY[ASK.index(turns[0].text) % 3] for w in words) / max(len(words), 1)

    def weights(self, f):
        "Change the weights in place."
        with torch.no_grad(): f(self.policy.model)
        self.policy.updated()

# each: (what is done in a round from BREAK on, in words; the doing; settings it needs)
def poison(d, i): return {'loss': math.nan}
def sharpen(d, i): d.weights(lambda m: m.get_output_embeddings().weight.mul_(1.35) if i < 8 else None)
def push(d, i):
    if i == 0:
        g = torch.Generator().manual_seed(d.config.seed)
        d.weights(lambda m: [p.add_(torch.randn(p.shape, generator=g) * p.std()) for p in m.parameters() if p.dim() > 1])
def blind(d, i): d.paid = lambda turns: .5
def inflate(d, i):
    real = d.right
    d.paid = (lambda turns: 40 * real(turns)) if i < 3 else real
def strict(d, i):
    real = d.right
    d.paid = lambda turns: real(turns) - .03 * (i + 1)
def endless(d, i):
    if i: return
    end = list(d.policy.format.end_ids)
    head = d.policy.model.get_output_embeddings()
    def quieter(module, args, out):
        out = out.clone(); out[..., end] -= 5.
        return out
    head.register_forward_hook(quieter)
    d.policy.updated()
def cut(d, i): d.trainer.settings = replace(d.trainer.settings, max_completion_length=3)
def hack(d, i):
    real = d.right
    d.paid = lambda turns: .3 * real(turns) + sum(w in SAY[3:] for w in turns[-1].text.split()) / max(len(turns[-1].text.split()), 1)

FAULTS = {  # detector -> (what is broken, how, settings)
    'not_finite': ('the loss becomes NaN (written into the metrics)', poison, {}),
    'entropy_collapse': ('the last layer grows by 35 % a round', sharpen, {}),
    'kl_spike': ('noise on all weights, once', push, {}),
    'reward_variance_gone': ('every answer is paid 0.5', blind, {}),
    'advantages_zero': ('every answer is paid 0.5, without a KL term', blind, {'beta': 0.}),
    'gradient_spike': ('three rounds are paid 40-fold, unscaled', inflate, {'scale_rewards': False, 'beta': 0.}),
    'reward_drift': ('the judge takes off 0.03 more each round', strict, {}),
    'length_blowup': ('the end of an answer becomes unlikely', endless, {}),
    'truncation': ('answers are cut after three tokens', cut, {}),
    'reward_hacking': ('three words that are never right are paid three times as much', hack, {'learning_rate': 3e-3, 'beta': 0., 'num_iterations': 2})}

async def run(desk, fault=None) -> list[dict]:
    "The metrics of each round; the fault sets in after round BREAK."
    log, said = [], None
    async for m in desk.trainer.steps():
        log.append(m | (said or {}))
        if fault is not None and len(log) >= BREAK: said = fault(desk, len(log) - BREAK)
    return log

SEEDS = {'train': [0, 2, 4, 6, 8], 'test': [10, 11, 12, 13, 14]}  # those that set the limits, and those that judge them

def runs(seeds, rounds_healthy) -> list[dict]:
    policy, res = clerk(), []
    for seed in seeds:
        for name, settings in HEALTHY.items():
            res.append({'seed': seed, 'fault': None, 'name': name, 'log': asyncio.run(run(Desk(policy, seed, num_episodes=rounds_healthy, **settings)))})
        for name, (_, how, settings) in FAULTS.items():
            res.append({'seed': seed, 'fault': name, 'name': name, 'log': asyncio.run(run(Desk(policy, seed, **settings), how))})
        print('seed', seed, 'done', round(time.process_time()), 's CPU', flush=True)
    return res

def strengths(log) -> dict[str, list[float]]:
    "The signal of each detector, round by round; NaN where it cannot say."
    pack = DetectorPack()
    rows = [pack.observe(m) for m in log]
    return {d.name: [r.get(d.name, math.nan) for r in rows] for d in DETECTORS}

def held(values, n) -> float:
    "The highest level that is kept for n + 1 values."
    v = [x for x in values if not math.isnan(x)]
    return max((min(v[i:i + n + 1]) for i in range(len(v) - n)), default=-math.inf)

def alerts_of(log) -> list[tuple[int, str]]:
    "(round, detector) of each alert."
    pack, manager = DetectorPack(), AlertManager()
    for d in DETECTORS: manager.add_rule(d.rule())
    for i, m in enumerate(log, 1):
        for k, v in pack.observe(m).items(): manager.observe(f'detector/{k}', v, i)
    return [(a.step, a.rule) for a in manager.history if a.state == 'firing']

def judge(records, detectors=DETECTORS) -> dict:
    "What was seen, by detector, on these runs."
    healthy = [(r, alerts_of(r['log'])) for r in records if r['fault'] is None]
    faulty = [(r, alerts_of(r['log'])) for r in records if r['fault'] is not None]
    rounds = sum(len(r['log']) for r, _ in healthy) + sum(BREAK for _ in faulty)
    pages = [(r['name'], r['seed'], *a) for r, found in healthy for a in found] + [(r['name'], r['seed'], *a) for r, found in faulty for a in found if a[0] <= BREAK]
    rows = []
    for d in detectors:
        mine = [(r, [s for s, k in found if k == d.name and BREAK < s <= BREAK + WITHIN]) for r, found in faulty if r['fault'] == d.name]
        after = [s[0] - BREAK for _, s in mine if s]
        calm = max((held(strengths(r['log'])[d.name], d.for_rounds) for r, _ in healthy), default=math.nan)
        weak = min((held(strengths(r['log'])[d.name][BREAK:], d.for_rounds) for r, _ in faulty if r['fault'] == d.name), default=math.nan)
        rows.append({'detector': d.name, 'limit': d.limit, 'runs': len(mine), 'seen': len(after), 'rounds': float(np.median(after)) if after else None, 'false': sum(p[3] == d.name for p in pages),
                     'strongest healthy': calm, 'weakest faulty': weak, 'between': math.sqrt(calm * weak) if calm > 0 else weak / 2})
    return {'healthy_rounds': rounds, 'false_pages': pages, 'rows': rows}

# ---- cost

def best(f, repeats) -> float:
    "CPU seconds of the fastest repeat."
    res = []
    for _ in range(repeats):
        t = time.process_time(); f(); res.append(time.process_time() - t)
    return min(res)

class Slow:
    "A sink that takes its time."
    def write(self, points): time.sleep(.05)
    def alert(self, alert): pass
    def close(self): pass

class Hung(Slow):
    def write(self, points): time.sleep(3600)

def calls(dash, n, **kw) -> tuple[float, float]:
    "(p50, p99) of one call, microseconds."
    took = np.empty(n)
    for i in range(n):
        t = time.perf_counter_ns(); dash.log_metric('train.loss', .5, **kw); took[i] = time.perf_counter_ns() - t
    return tuple(np.percentile(took, [50, 99]) / 1000)

def cost(n, repeats) -> list[dict]:
    a = MetricAggregator()
    handle, bulk, noise = a.handle('x'), [.5] * 10_000, np.random.default_rng(0).random(10_000).tolist()
    def by_name():
        for _ in range(n): a.add('x', .5)
    def by_handle():
        for _ in range(n): handle(.5)
    def in_bulk():
        for _ in range(n // 1000): a.extend('x', bulk)
    rows = [{'what': 'add by name, M/s', 'value': n / best(by_name, repeats) / 1e6, 'goal': '>= 5'}, {'what': 'add by handle, M/s', 'value': n / best(by_handle, repeats) / 1e6, 'goal': '>= 15'},
            {'what': 'add in bulk, M/s', 'value': n // 1000 * 10_000 / best(in_bulk, repeats) / 1e6, 'goal': '>= 100'}]
    a.extend('x', noise)
    s, w = a.stats('x'), a.values('x')
    off = max(abs(v - q) for v, q in zip((s.p50, s.p95, s.p99), np.percentile(w, [50, 95, 99])))
    import tracemalloc
    tracemalloc.start(); b = MetricAggregator(); [b.add('y', float(v)) for v in np.random.default_rng(1).random(20_000)]; kept = tracemalloc.get_traced_memory()[0]; tracemalloc.stop()
    rows += [{'what': '7 statistics of 10,000 values, ms', 'value': 1000 * best(lambda: [a.stats('x') for _ in range(20)], repeats) / 20, 'goal': '<= 0.5'},
             {'what': 'largest difference from np.percentile', 'value': off, 'goal': '<= 1e-12'}, {'what': 'memory of a metric, KB', 'value': kept / 1000, 'goal': '<= 400'}]
    with tempfile.TemporaryDirectory() as tmp:
        for name, sinks in (('no sink', {}), ('a metrics file', {'file': MetricsFile(f'{tmp}/m.jsonl')}), ('a sink of 50 ms', {'slow': Slow()}), ('a sink that hangs', {'hung': Hung()})):
            dash = AdvancedDashboard(sinks=sinks)
            p50, p99 = min(calls(dash, n // 10) for _ in range(repeats))
            rows += [{'what': f'log_metric, {name}, p50, us', 'value': p50, 'goal': '<= 1'}, {'what': f'log_metric, {name}, p99, us', 'value': p99, 'goal': '<= 20'}]
            dash.stop_monitoring(.2)
    dash = AdvancedDashboard(labels={'run': 'bench'}, detectors=DETECTORS)
    for i in range(40): dash.on_log(i, {m: .5 for m in ('loss', 'reward', 'kl', 'entropy', 'grad_norm', 'success', 'learning_rate', 'completions/mean_length', 'rewards/a/mean', 'rewards/b/mean')})
    t = time.process_time()
    for e in range(n): dash.log_metric('train.loss', .5, episode=e, model='clerk')
    each = (time.process_time() - t) / n
    for _ in range(12_000): dash.log_metric('api.latency_seconds', .2, model='clerk')
    rows += [{'what': 'log_metric with episode and model, us', 'value': 1e6 * each, 'goal': '-'}, {'what': f'/metrics after {n:,} episodes, KB', 'value': len(dash.metrics_text()) / 1024, 'goal': '<= 64'},
             {'what': f'/metrics after {n:,} episodes, ms', 'value': 1000 * best(dash.metrics_text, repeats), 'goal': '<= 10'}]
    return rows

# ---- the page

def met(row) -> str:
    if row['goal'] == '-': return '-'
    sign, bound = row['goal'].split()
    return 'yes' if (row['value'] >= float(bound) if sign == '>=' else row['value'] <= float(bound)) else '**NO**'

def markdown(doc) -> str:
    lines = ['# Monitoring: what it costs, and what it sees', '', __doc__.split('**Detectors.**')[0].split('\n\n')[0].strip(), '']
    if 'test' in doc:
        t = doc['test']
        seen, n = sum(r['seen'] for r in t['rows']), sum(r['runs'] for r in t['rows'])
        lines += ['## Detectors', '', ' '.join(__doc__.split('**Detectors.**')[1].split('**Cost.**')[0].split()), '',
                  f'**Recall {seen} of {n} ({100 * seen / n:.1f} %), goal 95 %: {"met" if seen >= .95 * n else "NOT met"}. False pages {len(t["false_pages"])} in {t["healthy_rounds"]:,} healthy rounds ({1000 * len(t["false_pages"]) / t["healthy_rounds"]:.2f} in 1,000), goal 1: {"met" if len(t["false_pages"]) <= t["healthy_rounds"] / 1000 else "NOT met"}.** '
                  f'Seeds {", ".join(map(str, doc["seeds"]["test"]))}; the limits come from seeds {", ".join(map(str, doc["seeds"]["train"]))}.', '',
                  '| detector | what is broken | limit | seen | median rounds | false pages | strongest healthy signal | weakest of the fault | on the seeds of the limits |', '| --- | --- | --- | --- | --- | --- | --- | --- | --- |']
        for r, o in zip(t['rows'], doc['train']['rows']):
            lines.append(f'| {r["detector"]} | {FAULTS[r["detector"]][0]} | {r["limit"]:g} | {r["seen"]} of {r["runs"]} | {r["rounds"] if r["rounds"] is not None else "-"} | {r["false"]} | {r["strongest healthy"]:.2f} | {r["weakest faulty"]:.2f} | '
                         f'{o["strongest healthy"]:.2f} / {o["weakest faulty"]:.2f}, between {o["between"]:.2g} |')
        lines += ['', *(f'False page: {p[0]}, seed {p[1]}, round {p[2]}, {p[3]}.' for p in t['false_pages'])]
    if 'cost' in doc:
        lines += ['', '## Cost', '', ' '.join(__doc__.split('**Cost.**')[1].split()), '', '| what | measured | goal | met |', '| --- | --- | --- | --- |']
        lines += [f'| {r["what"]} | {r["value"]:.3g} | {r["goal"]} | {met(r)} |' for r in doc['cost']]
    m = doc['machine']
    return '\n'.join([*lines, '', f'{m["cpu"]}, {m["cores"]} cores shared with other work (load {m["load"]:.1f}), python {m["python"]}, torch {m["torch"]}, stateset_nb {m["stateset_nb"]}.', ''])

def machine() -> dict:
    info = Path('/proc/cpuinfo')
    cpu = next((l.split(':', 1)[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')), '') if info.is_file() else ''
    return {'cpu': cpu or platform.machine(), 'cores': os.cpu_count(), 'load': os.getloadavg()[0], 'python': platform.python_version(), 'torch': torch.__version__, 'stateset_nb': stateset_nb.__version__}

def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--part', choices=('detectors', 'cost'))
    p.add_argument('--quick', action='store_true')
    p.add_argument('--logs', type=Path, help='where the logs of the runs are kept; seeds that are there are not run again')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    out = HERE / 'results' / ('tmp' if args.quick else '')
    file = out / 'monitoring.json'
    doc = json.loads(file.read_text()) if file.is_file() and args.part else {}
    doc |= {'schema': 1, 'machine': machine()}
    if args.part != 'cost':
        seeds = {'train': [0], 'test': [10]} if args.quick else SEEDS
        records = json.loads(args.logs.read_text()) if args.logs and args.logs.is_file() else []
        records += runs(sorted({s for half in seeds.values() for s in half} - {r['seed'] for r in records}), 30 if args.quick else 40)
        if args.logs: write_text(args.logs, json.dumps(records))
        doc |= {'seeds': seeds} | {half: judge([r for r in records if r['seed'] in mine]) for half, mine in seeds.items()}
    if args.part != 'detectors': doc['cost'] = cost(20_000 if args.quick else 1_000_000, 2 if args.quick else 5)
    write_text(file, json.dumps(doc, indent=1))
    write_text(out / 'monitoring.md', markdown(doc))
    print(markdown(doc))

if __name__ == '__main__': main()
