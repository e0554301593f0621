"""Writes the files beside it: rules with their unit tests, and Grafana's dashboard. Metric names come from `METRICS` of `stateset_nb.monitoring`, so a renamed metric stops here and not on a wall.

    python deployment/monitoring/generate.py          # write
    promtool check rules rules.yml && promtool test rules rules_test.yml
"""
import json, re
from pathlib import Path

import yaml

from stateset_nb.monitoring import METRICS

HERE = Path(__file__).parent
NAME = {m.key: m.name for m in METRICS}

def q(query: str) -> str:
    "A query with <key> in place of exported names."
    return re.sub(r'<([a-z][a-z_./]*)>', lambda m: NAME[m[1]], query)

# name, query, for, severity, summary, action, (firing series -> values, silent series -> values, minute to look at), labels the alert has
RUN = 'job="stateset", run="night-7"'
RULES = [
    ('StatesetAlert', '<stateset/firing> == 1', '0m', None, 'A rule or a detector of the process fires.', 'Look at the label alert; the dashboard of the process says what to do.',
     {f'<stateset/firing>{{{RUN}, alert="kl_spike", severity="error"}}': '1x10'}, {f'<stateset/firing>{{{RUN}, alert="kl_spike", severity="error"}}': '0x10'}, 2, {'alert': 'kl_spike', 'severity': 'error'}),
    ('TargetDown', 'up{job="stateset"} == 0', '2m', 'critical', 'The process does not answer.', 'Is it running, and is its port open to Prometheus?', {'up{job="stateset", run="night-7"}': '0x10'}, {'up{job="stateset", run="night-7"}': '1x10'}, 5, {}),
    ('LossNotFinite', 'abs(<loss>) == Inf or <loss> != <loss>', '0m', 'critical', 'The loss is no number.', 'Go back to the last checkpoint; lower learning_rate or max_grad_norm.', {f'<loss>{{{RUN}}}': 'NaN NaN NaN NaN'}, {f'<loss>{{{RUN}}}': '0.2x10'}, 2, {}),
    ('KLHigh', '<kl>_max > 5', '2m', 'error', 'The policy is far from its reference.', 'Lower learning_rate, raise beta, or go back to the last checkpoint.', {f'<kl>_max{{{RUN}}}': '7x10'}, {f'<kl>_max{{{RUN}}}': '0.1x10'}, 5, {}),
    ('TrainingStalls', 'changes(<train/episode>[15m]) == 0', '15m', 'error', 'No round was finished for half an hour.', 'Is the run paused, or does a tool or a judge hang?', {f'<train/episode>{{{RUN}}}': '7x60'}, {f'<train/episode>{{{RUN}}}': '1+1x60'}, 45, {}),
    ('NothingToLearn', 'avg_over_time(<frac_reward_zero_std>[15m]) > 0.9', '10m', 'warning', 'Groups agree, so nothing is learnt.', 'Take scenarios of other difficulty, more num_generations, or a finer reward.',
     {f'<frac_reward_zero_std>{{{RUN}}}': '1x60'}, {f'<frac_reward_zero_std>{{{RUN}}}': '0.3x60'}, 30, {}),
    ('HeldOutSuccessFalls', '<eval/success> < max_over_time(<eval/success>[6h]) - 0.15', '10m', 'error', 'Held-out success is far below its best.', 'Read the best-paid episodes; go back to the best checkpoint.',
     {f'<eval/success>{{{RUN}}}': '0.8x30 0.4x60'}, {f'<eval/success>{{{RUN}}}': '0.6+0.001x90'}, 60, {}),
    ('EpisodesFail', '<error_rate> > 0.2', '5m', 'error', 'Many episodes fail.', 'Read Trajectory.error; often a tool or a server is down.', {f'<error_rate>{{{RUN}}}': '0.5x20'}, {f'<error_rate>{{{RUN}}}': '0x20'}, 10, {}),
    ('ApiErrors', 'rate(<api.errors>[5m]) / rate(<api.requests>[5m]) > 0.05', '5m', 'error', 'Many requests fail.', 'Look at the logs of the server.', {f'<api.errors>{{{RUN}}}': '0+20x30', f'<api.requests>{{{RUN}}}': '0+100x30'},
     {f'<api.errors>{{{RUN}}}': '0+1x30', f'<api.requests>{{{RUN}}}': '0+100x30'}, 20, {}),
    ('ApiSlow', '<api.latency_seconds>{quantile="0.95"} > 5', '5m', 'warning', 'Answers are slow.', 'Look at the queue, and add replicas.', {f'<api.latency_seconds>{{{RUN}, quantile="0.95"}}': '9x20'}, {f'<api.latency_seconds>{{{RUN}, quantile="0.95"}}': '0.4x20'}, 10, {'quantile': '0.95'}),
    ('MemoryFull', '<system/memory> > 0.95', '5m', 'error', 'Memory is almost full.', 'Use smaller batches, or find what grows.', {f'<system/memory>{{{RUN}}}': '0.99x20'}, {f'<system/memory>{{{RUN}}}': '0.5x20'}, 10, {}),
    ('GpuHot', '<system/gpu_temperature> > 90', '5m', 'warning', 'A GPU is hot and will slow down.', 'Look at its cooling.', {f'<system/gpu_temperature>{{{RUN}, gpu="0"}}': '95x20'}, {f'<system/gpu_temperature>{{{RUN}, gpu="0"}}': '60x20'}, 10, {'gpu': '0'}),
    ('GpuMemoryFull', '<system/gpu_memory> > 0.98', '5m', 'warning', 'The memory of a GPU is almost full.', 'Lower micro_batch_tokens, or use gradient_checkpointing.', {f'<system/gpu_memory>{{{RUN}, gpu="0"}}': '0.99x20'}, {f'<system/gpu_memory>{{{RUN}, gpu="0"}}': '0.7x20'}, 10, {'gpu': '0'}),
    ('SinkFails', 'increase(<stateset/sink_errors>[10m]) > 0 or increase(<stateset/dropped_points>[10m]) > 0', '0m', 'warning', 'A tracker or a file does not get every point.', 'Look at sinks in the summary of the dashboard; the training goes on.',
     {f'<stateset/sink_errors>{{{RUN}, sink="trackio"}}': '0x5 3x20'}, {f'<stateset/sink_errors>{{{RUN}, sink="trackio"}}': '0x25'}, 8, {'sink': 'trackio'}),
    ('SeriesDropped', 'increase(<stateset/dropped_series>[10m]) > 0', '0m', 'warning', 'There are too many series.', 'Use fewer labels; what takes many values is a value.', {f'<stateset/dropped_series>{{{RUN}}}': '0x5 9x20'}, {f'<stateset/dropped_series>{{{RUN}}}': '0x25'}, 8, {}),
]

def rules() -> dict:
    return {'groups': [{'name': 'stateset', 'rules': [{'alert': n, 'expr': q(e), 'for': d, **({'labels': {'severity': s}} if s else {}), 'annotations': {'summary': a, 'action': b}} for n, e, d, s, a, b, *_ in RULES]}]}

def rule_tests() -> dict:
    def one(name, severity, summary, action, series, minute, labels, fires):
        said = [{'exp_labels': {'job': 'stateset', 'run': 'night-7', **({'severity': severity} if severity else {}), **labels}, 'exp_annotations': {'summary': summary, 'action': action}}]
        return {'name': f'{name} {"fires" if fires else "is silent"}', 'interval': '1m', 'input_series': [{'series': q(k), 'values': v} for k, v in series.items()],
                'alert_rule_test': [{'eval_time': f'{minute}m', 'alertname': name, 'exp_alerts': said if fires else []}]}
    return {'rule_files': ['rules.yml'], 'evaluation_interval': '1m', 'tests': [one(n, s, a, b, series, t, l, fires) for n, _, _, s, a, b, firing, silent, t, l in RULES for series, fires in ((firing, True), (silent, False))]}

ON = '{job="$job", run=~"$run"}'
ROWS = [  # row, panels: title, unit, queries with their legends
    ('Training', [
        ('Reward', 'none', [(f'<reward>{ON}', 'reward'), (f'<reward_std>{ON}', 'spread within a group')]),
        ('Success', 'percentunit', [(f'<success>{ON}', 'of the round'), (f'<eval/success>{ON}', 'held out')]),
        ('Loss', 'none', [(f'<loss>{ON}', 'loss'), (f'<loss>_max{ON}', 'highest of 100 rounds')]),
        ('Distance from the reference', 'none', [(f'<kl>{ON}', 'nats a token'), (f'<kl>_max{ON}', 'highest of 100 rounds')]),
        ('Entropy', 'none', [(f'<entropy>{ON}', 'nats a token')]),
        ('Gradient', 'none', [(f'<grad_norm>{ON}', 'length'), (f'<grad_norm>_max{ON}', 'highest of 100 rounds')]),
        ('Groups that agree, episodes that are cut or fail', 'percentunit', [(f'<frac_reward_zero_std>{ON}', 'agree'), (f'<completions/clipped_ratio>{ON}', 'cut'), (f'<error_rate>{ON}', 'failed')]),
        ('Tokens of an episode', 'none', [(f'<completions/mean_length>{ON}', 'mean')]),
        ('Time of a round', 's', [(f'<time/rollout>{ON}', 'play'), (f'<time/update>{ON}', 'learn')]),
        ('Rounds', 'none', [(f'<train/episode>{ON}', 'number'), (f'rate(<train/episodes>{ON}[5m]) * 3600', 'an hour')]),
        ('Learning rate', 'none', [(f'<learning_rate>{ON}', 'learning rate')])]),
    ('Serving', [
        ('Requests', 'reqps', [(f'rate(<api.requests>{ON}[5m])', 'answered'), (f'rate(<api.errors>{ON}[5m])', 'failed')]),
        ('Latency', 's', [(f'<api.latency_seconds>{ON}', 'quantile {{quantile}}')])]),
    ('Machine', [
        ('Processors and memory', 'percentunit', [(f'<system/cpu>{ON}', 'processors'), (f'<system/memory>{ON}', 'memory')]),
        ('Memory', 'bytes', [(f'<system/memory_used>{ON}', 'machine'), (f'<system/process_memory>{ON}', 'process')]),
        ('Disk', 'Bps', [(f'rate(<system/disk_read>{ON}[5m])', 'read'), (f'rate(<system/disk_written>{ON}[5m])', 'written')]),
        ('GPU', 'percentunit', [(f'<system/gpu>{ON}', 'busy, GPU {{gpu}}'), (f'<system/gpu_memory>{ON}', 'memory, GPU {{gpu}}')]),
        ('GPU temperature', 'celsius', [(f'<system/gpu_temperature>{ON}', 'GPU {{gpu}}')]),
        ('GPU memory', 'bytes', [(f'<system/gpu_memory_used>{ON}', 'GPU {{gpu}}')])]),
    ('Alerts and monitoring itself', [
        ('Firing', 'none', [(f'<stateset/firing>{ON} == 1 or <stateset/firing>{ON}', '{{alert}} ({{severity}})')]),
        ('How often they fired', 'none', [(f'<stateset/alerts>{ON}', '{{alert}}')]),
        ('Lost on the way', 'none', [(f'<stateset/dropped_points>{ON}', 'points, {{sink}}'), (f'<stateset/sink_errors>{ON}', 'errors, {{sink}}'), (f'<stateset/dropped_series>{ON}', 'series')])]),
    ('vLLM, where it samples', [
        ('Requests', 'none', [('vllm:num_requests_running', 'running'), ('vllm:num_requests_waiting', 'waiting')]),
        ('KV cache', 'percentunit', [('vllm:kv_cache_usage_perc', 'in use')]),
        ('Time to the first token', 's', [('histogram_quantile(0.95, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[5m])))', 'p95')])])]

def dashboard() -> dict:
    source = {'type': 'prometheus', 'uid': '${source}'}
    panels, y, n = [], 0, 0
    for row, members in ROWS:
        panels.append({'id': (n := n + 1), 'type': 'row', 'title': row, 'collapsed': False, 'gridPos': {'h': 1, 'w': 24, 'x': 0, 'y': y}, 'panels': []})
        y += 1
        for i, (title, unit, queries) in enumerate(members):
            targets = [{'refId': chr(65 + k), 'datasource': source, 'expr': q(e), 'legendFormat': legend, 'editorMode': 'code', 'range': True} for k, (e, legend) in enumerate(queries)]
            panels.append({'id': (n := n + 1), 'type': 'timeseries', 'title': title, 'datasource': source, 'gridPos': {'h': 7, 'w': 8, 'x': 8 * (i % 3), 'y': y + 7 * (i // 3)},
                           'fieldConfig': {'defaults': {'unit': unit, 'custom': {'lineWidth': 1, 'fillOpacity': 5, 'showPoints': 'never'}}, 'overrides': []}, 'options': {'legend': {'displayMode': 'list', 'placement': 'bottom'}, 'tooltip': {'mode': 'multi'}}, 'targets': targets})
        y += 7 * -(-len(members) // 3)
    def variable(name, query): return {'name': name, 'type': 'query', 'datasource': source, 'query': query, 'refresh': 2, 'includeAll': name == 'run', 'multi': name == 'run', 'allValue': '.*', 'current': {}}
    return {'title': 'stateset_nb', 'uid': 'stateset-nb', 'schemaVersion': 39, 'version': 1, 'editable': True, 'refresh': '10s', 'time': {'from': 'now-1h', 'to': 'now'}, 'tags': ['stateset'], 'panels': panels, 'annotations': {'list': []},
            'templating': {'list': [{'name': 'source', 'type': 'datasource', 'query': 'prometheus', 'current': {}}, variable('job', q('label_values(<stateset/dropped_series>, job)')), variable('run', q('label_values(<stateset/dropped_series>{job="$job"}, run)'))]}}

def files() -> dict[str, str]:
    "Name -> content of what is generated."
    as_yaml = lambda d: '# written by generate.py\n' + yaml.safe_dump(d, sort_keys=False, width=200, allow_unicode=True)
    return {'rules.yml': as_yaml(rules()), 'rules_test.yml': as_yaml(rule_tests()), 'grafana-dashboard.json': json.dumps(dashboard(), indent=1) + '\n'}

if __name__ == '__main__':
    for name, text in files().items(): (HERE / name).write_text(text, encoding='utf-8')
