"""What a learnt reward is worth on real labels, beside its rivals and beside people, and how fast it is.

    python benchmarks/reward.py              # every set, three seeds (about an hour and a half of CPU time), then the speeds
    python benchmarks/reward.py --quick      # few labels, one seed: does it run, and what does the table look like?
    python benchmarks/reward.py --data DIR   # the label files elsewhere; a set that is absent is skipped with one line

Each set is split by conversation and by prompt text together (65 / 15 / 20), with each seed. The frozen phase and both phases are trained on the
same split; rivals are fitted on the same training labels. Seeds are pooled: a figure is that of all test labels of all seeds, its interval, and that of
each lead, from a bootstrap over conversations (a conversation that is tested under two seeds is drawn with both). What was measured is kept under
runs/reward_bench, so an interrupted bench goes on. The full bench writes benchmarks/results/reward.{json,md}; --quick writes to benchmarks/results/tmp.

Speeds are CPU seconds (time.process_time) of the process, medians of interleaved repeats in one run, given as ratios.
"""
import argparse, json, os, platform, time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers

import stateset_nb
from stateset_nb import reward_model as rm
from stateset_nb.core import content_hash, stream, write_text
from stateset_nb.reward_model import RewardDataset, RewardTrainingConfig, TransformerRewardModel, TransformerRewardTrainer, rater_agreement, report_rows, rival_scores, speed_up

HERE = Path(__file__).parent
DATA = HERE.parent.parent / 'shared' / 'data'
HH = 'hh_rlhf_test/pairs.jsonl'
PAIRS = dict(window=256, max_windows=1, epochs=2)
SETS = {  # file, what is taken, settings, ceiling of the main metric with its source
    'xstest_part': ('xstest_part/scalar.jsonl', {}, dict(window=128, max_windows=1, epochs=3), (None, 'two raters of each answer, ICC')),
    'hh harmless-base': (HH, {'subset': 'harmless-base'}, PAIRS, (.73, 'published agreement .63 to .73')),
    'hh helpful-base': (HH, {'subset': 'helpful-base'}, PAIRS, (.73, 'published agreement .63 to .73')),
    'hh, four subsets mixed': (HH, {}, PAIRS, (.73, 'published agreement .63 to .73')),
    'llmbar': ('llmbar/pairs.jsonl', {}, PAIRS, (.94, 'published, experts'))}
LEARNT = ('two_phase', 'frozen')

# ---- quality

def labels(data: Path, name: str, n: int) -> RewardDataset:
    "The labels of a set, at most `n` of them, each with the number of its family in its notes."
    file, wanted, _, _ = SETS[name]
    d = RewardDataset.load(data / file)
    which = [i for i, note in enumerate(d.notes) if all(note.get(k) == v for k, v in wanted.items())]
    which = sorted(sorted(which, key=lambda i: stream('bench', i))[:n])
    family = rm._linked([d[i] for i in which])
    return RewardDataset(tuple(d[i] for i in which), tuple(d.notes[i] | {'family': f} for i, f in zip(which, family)))

def config_of(name: str, seed: int, quick: bool) -> RewardTrainingConfig:
    c = RewardTrainingConfig(seed=seed, form='joint', report=False, **SETS[name][2])
    return replace(c, epochs=1, head_epochs=10) if quick else c

def one(data: Path, name: str, seed: int, n: int, quick: bool, work: Path) -> dict:
    "Everybody's scores on the test labels of one split."
    c = config_of(name, seed, quick)
    note = work / f'{content_hash([name, n, c.to_dict()])}.json'
    if note.is_file(): return json.loads(note.read_text())
    train, val, test = labels(data, name, n).split((.65, .15, .2), seed)
    began, t = time.process_time(), None
    found, about, scores = {}, {}, {}
    for method in LEARNT:
        start = time.process_time()
        found[method] = TransformerRewardTrainer(replace(c, method=method)).train(train, val)
        about[method] = {'selected': found[method]['selected'], 'val_loss': round(found[method]['val_loss'], 5), 'cpu_s': round(time.process_time() - start, 1)}
        encoder = found[method]['model'].encoder
        t = rm._labels(test, encoder)
        scores[method] = found[method]['model'].predict(t.items).tolist()
        if method == 'frozen': scores |= {k: v.tolist() for k, v in rival_scores(rm._labels(train, encoder), t.items, c.encoder, c.window, seed, c.max_windows, c.precision).items()}
    res = {'set': name, 'seed': seed, 'labels': [len(train), len(val), len(test)], 'about': about, 'inputs': found['frozen']['model'].look(t.items).to_dict(), 'equal_pairs': t.equal,
           'targets': {k: getattr(t.targets, k).tolist() for k in ('a', 'b', 'y', 'weight')}, 'family': [test.notes[i]['family'] for i in t.kept], 'scores': scores, 'cpu_s': round(time.process_time() - began, 1)}
    write_text(note, json.dumps(res))
    print(f'{name}, seed {seed}: {res["cpu_s"]:.0f} CPU seconds, selected {about["two_phase"]["selected"]}', flush=True)
    return res

def pooled(runs: list[dict]) -> tuple[dict, rm._Targets]:
    "The scores and labels of all seeds in one table."
    starts = np.cumsum([0] + [len(r['scores']['frozen']) for r in runs])
    a = np.concatenate([np.array(r['targets']['a']) + s for r, s in zip(runs, starts)])
    b = np.concatenate([np.where((v := np.array(r['targets']['b'])) < 0, -1, v + s) for r, s in zip(runs, starts)])
    flat = lambda k: np.concatenate([np.array(r['targets'][k]) for r in runs])
    return {k: np.concatenate([r['scores'][k] for r in runs]) for k in runs[0]['scores']}, rm._Targets(a, b, flat('y'), flat('weight'), np.concatenate([r['family'] for r in runs]))

def ceiling_of(data: Path, name: str, n: int) -> float | None:
    known = SETS[name][3][0]
    agreed = rater_agreement([rm._unit_ratings(e) for e in labels(data, name, n) if isinstance(e, rm.RewardExample)])
    return known if known is not None else agreed.ceiling if agreed else None

def judged(data: Path, name: str, runs: list[dict], n: int) -> dict:
    "The table of one set."
    scores, t = pooled(runs)
    main = 'pearson' if t.rated.any() else 'pairwise_accuracy'
    ceiling, chance = ceiling_of(data, name, n), 0. if main == 'pearson' else .5
    show = lambda i: None if i is None else {'value': round(i.value, 4), 'low': round(i.low, 4), 'high': round(i.high, 4), 'n': i.n}
    tables = {m: report_rows({'model': scores[m]} | {k: v for k, v in scores.items() if k != m}, t, main) for m in LEARNT}
    rows = [{'scorer': r.name if r.name != 'model' else 'two_phase', **{k: show(v) for k, v in r.metrics.items()}, 'lead': show(r.lead)} for r in tables['two_phase']]
    rivals = [r for r in rows if r['scorer'] in rm.RIVALS]
    best = max(rivals, key=lambda r: r[main]['value'])['scorer']
    value = rows[0][main]['value']
    frozen_lead = {r.name: show(r.lead) for r in tables['frozen'] if r.name in rm.RIVALS}
    return {'set': name, 'main': main, 'seeds': len(runs), 'labels': runs[0]['labels'], 'ceiling': ceiling, 'ceiling_source': SETS[name][3][1], 'share_of_ceiling': None if not ceiling else round((value - chance) / (ceiling - chance), 3),
            'best_rival': best, 'beats_frozen': rows[[r['scorer'] for r in rows].index('frozen')]['lead']['low'] > 0, 'beats_every_rival': all(r['lead']['low'] > 0 for r in rivals), 'frozen_beats_every_rival': all(v['low'] > 0 for v in frozen_lead.values()),
            'rows': rows, 'frozen_lead': frozen_lead, 'runs': [{'seed': r['seed'], 'cpu_s': r['cpu_s'], 'about': r['about'], 'inputs': r['inputs'], 'equal_pairs': r['equal_pairs']} for r in runs]}

# ---- speed

def texts(data: Path, n: int, mean: float) -> list[str]:
    "Texts of lognormal length, in words that add up to about `mean` tokens."
    rng = np.random.default_rng(0)
    words = ' '.join(e.chosen for e in labels(data, 'hh, four subsets mixed', 400)).split()
    lengths = rng.lognormal(np.log(mean / 1.35) - .18, .6, n).clip(4, 330).astype(int)
    return [' '.join(words[s:s + k]) for s, k in zip(rng.integers(0, len(words) - 400, n), lengths)]

def clocked(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began

def interleaved(works: dict, repeats: int) -> dict[str, float]:
    "Median CPU seconds of each."
    for w in works.values(): w()
    seen = {k: [] for k in works}
    for _ in range(repeats):
        for k, w in works.items(): seen[k].append(clocked(w))
    return {k: median(v) for k, v in seen.items()}

def head_model(precision: str = 'float32', window: int = 512) -> TransformerRewardModel:
    "A model with random heads: speed does not depend on what they know."
    torch.manual_seed(0)
    m = TransformerRewardModel(window=window, precision=precision, device='cpu').eval().requires_grad_(False)
    m.about = {'method': 'none', 'labels': 0, 'encoder': 'minilm'}
    return m

def prediction_speed(data: Path, n: int, repeats: int) -> dict:
    "Predictions a CPU second against sentence-transformers' encode and the same head."
    from sentence_transformers import SentenceTransformer
    said = texts(data, n, 120)
    items = [('', t) for t in said]
    st = SentenceTransformer(str(rm._packaged()), device='cpu')
    st.max_seq_length = 512
    plain, fast, half = head_model(), head_model(), head_model('auto')
    agreed = speed_up(fast, [('', t) for t in texts(data, 260, 120)])
    def theirs():
        with torch.inference_mode(): return torch.sigmoid(plain.logits(torch.from_numpy(st.encode(said, batch_size=32)))).double().mean(0).numpy()
    s = interleaved({'sentence-transformers + head': theirs, 'predict': lambda: plain.predict(items), 'predict, compiled [fast]': lambda: fast.predict(items), 'predict, precision auto': lambda: half.predict(items)}, repeats)
    base = s['sentence-transformers + head']
    tokens = [len(t) for t in plain.encoder.tokenizer(said)['input_ids']]
    return {'texts': n, 'mean_tokens': round(float(np.mean(tokens)), 1), 'threads': torch.get_num_threads(), 'bf16_here': rm.gains_from_bf16(), 'same_scores': round(float(np.corrcoef(theirs(), plain.predict(items))[0, 1]), 5), 'compiled_correlation': round(agreed, 5),
            'rows': [{'what': k, 'cpu_s': round(v, 3), 'texts_per_cpu_s': round(n / v, 1), 'ratio': round(base / v, 2)} for k, v in s.items()]}

def caching_speed(data: Path, n: int, repeats: int, epochs: int = 10) -> dict:
    "Ten epochs of the frozen phase with embeddings computed once, against encoding in each epoch."
    items = [('', t) for t in texts(data, n, 120)]
    m = head_model()
    y = torch.linspace(0, 1, n)
    def epoch(x, optimizer):
        for i in range(0, n, 16):
            loss = ((torch.sigmoid(m.logits(x[i:i + 16])[0]) - y[i:i + 16]) ** 2).mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    def run(cached):
        m.heads.requires_grad_(True)
        optimizer = torch.optim.AdamW(m.heads.parameters(), 1e-3)
        x = m.embed(items).clone() if cached else None
        for _ in range(epochs): epoch(m.embed(items).clone() if x is None else x, optimizer)
    s = interleaved({'encoded once': lambda: run(True), 'encoded each epoch': lambda: run(False)}, repeats)
    return {'texts': n, 'epochs': epochs, 'cpu_s': {k: round(v, 3) for k, v in s.items()}, 'ratio': round(s['encoded each epoch'] / s['encoded once'], 2)}

# ---- writing

def figure(i: dict | None) -> str: return '' if i is None else f'{i["value"]:.3f} [{i["low"]:.2f}, {i["high"]:.2f}]'

def verdict(t: dict) -> str:
    "What the table says, in words."
    lead = next(r['lead'] for r in t['rows'] if r['scorer'] == 'frozen')
    rows = [r['scorer'] for r in t['rows'] if r['scorer'] in rm.RIVALS and r['lead']['low'] <= 0]
    first = f'two-phase {"beats" if lead["low"] > 0 else "is worse than" if lead["high"] < 0 else "is not told apart from"} the frozen phase ({figure(lead)})'
    second = 'it beats every rival' if not rows else f'it does not beat {", ".join(rows)}'
    why = '' if lead['low'] > 0 and not rows else (' Why: ' + ('few labels' if sum(t['labels']) < 200 else 'one noisy bit a label; crowd workers agree on .63 to .73 of pairs' + ('; the subsets mix opposite tastes' if 'mixed' in t['set'] else '')
                                                   if t['set'].startswith('hh') else 'about 600 pairs whose label is whether an instruction was followed, which a sentence encoder hardly sees' if t['set'] == 'llmbar' else 'see the intervals') + '.')
    return f'{t["set"]}: {first}; {second}.{why}'

def markdown(res: dict) -> str:
    "The results as a page."
    lines = ['# The learnt reward on real labels', '', f'Written by `python benchmarks/reward.py{" --quick" if res["mode"] == "quick" else ""}`, {res["date"]}; {res["machine"]["cpu"]}, {res["threads"]} thread(s). Intervals are 95 %, by conversation, seeds pooled.', '']
    for t in res['sets']:
        ceiling = 'unknown' if t['ceiling'] is None else f'{t["ceiling"]:.2f} ({t["ceiling_source"]}); share reached by two-phase: {t["share_of_ceiling"]:.0%}'
        keys = [k for k in rm._SHORT if k in t['rows'][0]]
        lines += [f'## {t["set"]}', '', f'{t["seeds"]} seeds; train/validation/test {"/".join(map(str, t["labels"]))} labels. Human ceiling of {rm._SHORT[t["main"]]}: {ceiling}. Phase taken by validation: {", ".join(r["about"]["two_phase"]["selected"] for r in t["runs"])}.', '',
                  '| scorer | ' + ' | '.join(rm._SHORT[k] for k in keys) + f' | two-phase leads by ({rm._SHORT[t["main"]]}) |', '|---' * (len(keys) + 2) + '|',
                  *(f'| {r["scorer"]} | ' + ' | '.join(figure(r[k]) for k in keys) + f' | {figure(r["lead"])} |' for r in t['rows']), '', verdict(t), '']
    if res['sets_absent']: lines += [f'Absent here, so not measured: {", ".join(res["sets_absent"])}.', '']
    p, c = res['speed']['predictions'], res['speed']['caching']
    lines += ['## Speed', '', f'{p["texts"]} texts of mean {p["mean_tokens"]} tokens, {p["threads"]} thread(s), CPU time; scores of predict and of sentence-transformers correlate {p["same_scores"]}, compiled and plain {p["compiled_correlation"]}.'
              + (' This CPU computes in bf16, which precision auto uses.' if p['bf16_here'] else ' This CPU does not compute in bf16, so precision auto is float32.'), '', '| what | texts per CPU second | ratio |', '|---|---|---|',
              *(f'| {r["what"]} | {r["texts_per_cpu_s"]} | {r["ratio"]:.2f} |' for r in p['rows']), '', f'Frozen phase of {c["epochs"]} epochs on {c["texts"]} texts: embeddings computed once are {c["ratio"]:.1f} times as fast as encoding in each epoch (bounded by the number of epochs).', '']
    return '\n'.join(lines)

def machine() -> dict:
    info = Path('/proc/cpuinfo')
    names = [l.split(':', 1)[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.is_file() else []
    return {'cpu': names[0] if names else platform.processor() or platform.machine(), 'cores': os.cpu_count(), 'load': round(os.getloadavg()[0], 1)}

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='few labels, one seed')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--sets', nargs='*', default=list(SETS), help='some of: ' + ', '.join(SETS))
    p.add_argument('--labels', type=int, default=1240, help='ratings of a set, at most')
    p.add_argument('--pairs', type=int, default=900, help='preferences of a set, at most')
    p.add_argument('--data', type=Path, default=DATA)
    o = p.parse_args()
    work = HERE.parent / 'runs' / 'reward_bench'
    work.mkdir(parents=True, exist_ok=True)
    seeds = 1 if o.quick else o.seeds
    size = lambda s: 70 if o.quick else o.labels if s.startswith('xstest') else o.pairs
    there = [s for s in o.sets if (o.data / SETS[s][0]).is_file()]
    absent = [s for s in o.sets if s not in there]
    if absent: print(f'absent under {o.data}, so skipped: {", ".join(absent)}')
    if not there or not (o.data / HH).is_file(): return print(f'{o.data / HH} is not here: nothing to measure on')
    sets = [judged(o.data, s, [one(o.data, s, seed, size(s), o.quick, work) for seed in range(seeds)], size(s)) for s in there]
    count, repeats = (48, 3) if o.quick else (160, 7)
    res = {'schema': 1, 'mode': 'quick' if o.quick else 'full', 'date': time.strftime('%Y-%m-%d'), 'machine': machine(), 'threads': torch.get_num_threads(), 'sets_absent': absent,
           'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__, 'stateset_nb': stateset_nb.__version__}, 'sets': sets,
           'speed': {'predictions': prediction_speed(o.data, count, repeats), 'caching': caching_speed(o.data, count // 2, max(2, repeats // 2))}}
    out = HERE / 'results' / ('tmp' if o.quick else '')
    write_text(out / 'reward.json', json.dumps(res, indent=1) + '\n')
    write_text(out / 'reward.md', markdown(res))
    print(markdown(res))

if __name__ == '__main__': main()
