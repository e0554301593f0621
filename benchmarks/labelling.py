"""What one keypress of a labeller costs, from the handler's call to the committed label, in short queues and in long ones.

    python benchmarks/labelling.py                       # SQLite, queues of 1,000, 10,000 and 100,000 items (some minutes)
    python benchmarks/labelling.py --quick               # small queues: does it run, and what does the table look like?
    python benchmarks/labelling.py --postgres URL        # the same on PostgreSQL too: the address of an empty database

Half of each queue is labelled before, by the labeller who is measured and by another one, and a tenth of it is asked twice. A step is what a page asks for at one key: `label`, then `upcoming(8)`. Steps of all queues are
interleaved, in rounds; `undo`, `skip`, `progress` and `label_drift` are called at every fifth. Figures are milliseconds per call: wall clock (median and 90th percentile) and CPU time of this process (median; what a PostgreSQL server
does is in the wall clock alone).
`commit` is the floor: one row written and committed in the same database, nothing else. The page is written to benchmarks/results/labelling.{json,md}; --quick writes to benchmarks/results/tmp.
"""
import argparse, json, os, platform, tempfile, time
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from stateset_nb import labelling as L
from stateset_nb.core import Message, TrainingExample, write_text
from stateset_nb.labelling import Label, LabelQueue, fill_queue, label_drift
from stateset_nb.store import TrainingStore

HERE = Path(__file__).parent
CALLS = ('label', 'upcoming', 'label + upcoming', 'undo', 'skip', 'progress', 'drift', 'commit')

def talk(i: int) -> TrainingExample:
    "An example of some 600 characters."
    return TrainingExample(f'talk-{i:06}', (Message('user', f'Where is order {i}? ' + 'It should have come last week. ' * 8),), Message('assistant', f'Order {i} is on its way. ' + 'You will have it soon. ' * 12), redacted={})

def fill(store: TrainingStore, n: int) -> dict[str, float]:
    "A queue of `n` items."
    t0 = time.perf_counter()
    for i in range(0, n, 1000): store.add_many([talk(k) for k in range(i, min(n, i + 1000))])
    t1 = time.perf_counter()
    q = LabelQueue(store, 'bench', 'ann')
    fill_queue(q, [talk(i) for i in range(n)], value=np.random.default_rng(0).random(n))
    return {'ingest_s': t1 - t0, 'fill_queue_s': time.perf_counter() - t1}

def label_half(store: TrainingStore) -> None:
    "The first half of a queue as two people would have left it, written in one go."
    body = json.dumps(Label(3, comment='as before').to_dict())
    with store.begin() as c:
        items = c.execute(sa.select(L.ITEMS.c.item_id, L.ITEMS.c.wanted).order_by(L.ITEMS.c.rank)).all()
        items, n = items[:len(items) // 2], {'ann': 0, 'ben': 0}
        rows = {t: [] for t in (L.EVENTS, L.SAID, L.STANDING)}
        for k, r in enumerate(items):
            who = ('ann', 'ben')[k % 2]
            n[who] += 1
            rows[L.EVENTS].append(dict(queue='bench', labeller=who, n=n[who], event_id=f'old-{k}', kind='label', item_id=r.item_id, at=float(k), seconds=7., below=n[who] - 1 or None, before=None, undoes=None))
            rows[L.SAID].append(dict(queue='bench', event_id=f'old-{k}', item_id=r.item_id, body=body))
            rows[L.STANDING].append(dict(queue='bench', item_id=r.item_id, labeller=who, n=n[who], kind='label'))
        for t, new in rows.items():
            for i in range(0, len(new), 1000): c.execute(sa.insert(t), new[i:i + 1000])
        c.execute(sa.update(L.ITEMS).where(L.ITEMS.c.item_id.in_(sa.select(L.STANDING.c.item_id))).values(need=L.ITEMS.c.need - 1))
        L._insert_new(c, L.PILES, [dict(queue='bench', labeller=who, acts=k, top=k, done=k, skipped=0) for who, k in n.items()])

class Clock:
    "Wall and CPU milliseconds of calls, by name."
    def __init__(self) -> None: self.ms: dict[str, list[tuple[float, float]]] = {k: [] for k in CALLS}
    def __call__(self, what: str, f, *args):
        w, c = time.perf_counter(), time.process_time()
        out = f(*args)
        self.ms[what].append((1e3 * (time.perf_counter() - w), 1e3 * (time.process_time() - c)))
        return out
    def table(self) -> dict[str, dict[str, float]]:
        def row(x): return {'wall_ms': float(np.median(x[:, 0])), 'wall_p90_ms': float(np.quantile(x[:, 0], .9)), 'cpu_ms': float(np.median(x[:, 1])), 'n': len(x)}
        return {k: row(np.array(v)) for k, v in self.ms.items() if v}

def steps(q: LabelQueue, clock: Clock, n: int, seen: int) -> int:
    "Some keypresses."
    ahead = q.upcoming(8)
    for k in range(n):
        clock('label', q.label, ahead[0].id, Label(1 + seen % 5, comment='Says when.'), f'key-{seen}', 5.)
        ahead = clock('upcoming', q.upcoming, 8)
        clock.ms['label + upcoming'].append(tuple(map(sum, zip(clock.ms['label'][-1], clock.ms['upcoming'][-1]))))
        if k % 5 == 0:
            clock('undo', q.undo); clock('skip', q.skip, ahead[1].id); clock('progress', q.progress); clock('drift', label_drift, q); clock('commit', commit, q.store, f'row-{seen}')
            ahead = q.upcoming(8)
        seen += 1
    return seen

def commit(store: TrainingStore, name: str) -> None:
    "The least a database can do that keeps something."
    with store.begin() as c: c.execute(sa.text('INSERT INTO setting VALUES (:name, :value)'), {'name': name, 'value': 'x'})

def measure(url: str, sizes: list[int], rounds: int, each: int, kind: str) -> list[dict]:
    "One record for each size; steps of all sizes are interleaved."
    records, views, clocks, seen = [], [], [], [0] * len(sizes)
    for n in sizes:
        store = TrainingStore(url.format(n=n), redactor=None)
        record = {'database': kind, 'items': n} | fill(store, n)
        label_half(store)
        t = time.perf_counter()
        view = LabelQueue(store, 'bench', 'ann')
        view.next()
        records.append(record | {'open_and_first_item_ms': 1e3 * (time.perf_counter() - t)}); views.append(view); clocks.append(Clock())
        print(kind, n, {k: round(v, 2) for k, v in records[-1].items() if isinstance(v, float)}, flush=True)
    for r in range(rounds):
        for i, view in enumerate(views): seen[i] = steps(view, clocks[i] if r else Clock(), each, seen[i])  # the first round warms up
    for view in views: view.store.close()
    return [r | {'calls': c.table()} for r, c in zip(records, clocks)]

def page(doc: dict) -> str:
    "The results as Markdown."
    lines = ['# What a keypress of a labeller costs', '', ' '.join(__doc__.split('\n\n')[2].split()), '']
    for kind in dict.fromkeys(r['database'] for r in doc['records']):
        rs = [r for r in doc['records'] if r['database'] == kind]
        lines += [f'## {kind}', '', '| call | ' + ' | '.join(f'{r["items"]:,} items: wall (p90), CPU ms' for r in rs) + f' | {rs[-1]["items"]:,} : {rs[0]["items"]:,}, wall and CPU |', '|---' * (len(rs) + 2) + '|']
        for k in CALLS:
            cells = [r['calls'][k] for r in rs]
            lines.append(f'| {k} | ' + ' | '.join(f'{c["wall_ms"]:.1f} ({c["wall_p90_ms"]:.1f}), {c["cpu_ms"]:.2f}' for c in cells) + f' | {cells[-1]["wall_ms"] / cells[0]["wall_ms"]:.2f}, {cells[-1]["cpu_ms"] / cells[0]["cpu_ms"]:.2f} |')
        lines += ['| opening a queue and its first item | ' + ' | '.join(f'{r["open_and_first_item_ms"]:.1f}' for r in rs) + ' | |',
                  '| filling the queue, seconds | ' + ' | '.join(f'{r["fill_queue_s"]:.1f}' for r in rs) + ' | |', '']
    return '\n'.join([*lines, f'{doc["machine"]}, Python {platform.python_version()}, SQLAlchemy {sa.__version__}; load at the end {doc["load"]:.1f}.', ''])

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true')
    p.add_argument('--postgres', metavar='URL', help='the address of an empty database; {n} in it stands for the number of items, one database for each')
    args = p.parse_args()
    sizes, rounds, each = ([100, 300], 2, 10) if args.quick else ([1_000, 10_000, 100_000], 6, 40)
    with tempfile.TemporaryDirectory(dir='.' if not args.quick else None) as tmp:
        records = measure(f'sqlite:///{tmp}/{{n}}.db', sizes, rounds, each, 'SQLite')
        if args.postgres: records += measure(args.postgres, sizes, rounds, each, 'PostgreSQL')
    doc = {'schema': 1, 'mode': 'quick' if args.quick else 'full', 'machine': f'{platform.machine()}, {os.cpu_count()} cores, {platform.system()}', 'load': os.getloadavg()[0], 'records': records}
    out = HERE / 'results' / ('tmp' if args.quick else '')
    write_text(out / 'labelling.json', json.dumps(doc, indent=1) + '\n')
    print(page(doc)); write_text(out / 'labelling.md', page(doc))

if __name__ == '__main__': main()
