"""Our numbers beside TRL's own: its real `GRPOTrainer` gets the same tensors, or the same tokens and rewards. `pytest -s` prints the largest differences."""
import copy, gc, inspect, math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from conftest import Recorder, lacking
from stateset_nb.core import Segment, Trajectory, TrajectoryGroup
from stateset_nb.grpo import (LOSS_TYPES, SAMPLER_MODES, SCALES, agreeing_groups, gdpo_advantages, group_advantages, grpo_loss, kl_estimate, kl_penalty, mean_metrics, sampler_metrics, sampler_weights,
                              soft_overlong_punishment)
from stateset_nb.policy import CompactFormat, Policy, make_tokenizer, tiny_model
from stateset_nb.trainers import TrainingConfig, learn, play_metrics

pytestmark = pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.*:FutureWarning')  # TRL's, of transformers
WORST = defaultdict(float)

def check_same(ours, theirs, rel, what, size=0.):
    "Equal within `rel` of the largest entry, or of `size`: how large the terms were that a sum was made of."
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape and theirs.isfinite().all(), (what, ours, theirs)
    off = ((ours - theirs).abs().max() / max(theirs.abs().max().item(), float(size), 1e-30)).item()
    WORST[what] = max(WORST[what], off)
    assert off <= rel, f'{what}: {off:.1e} apart, {rel:.0e} allowed\n{ours}\n{theirs}'


@pytest.fixture(scope='module')
def trl(tmp_path_factory):
    "TRL, a tokenizer, and a folder with the reference model."
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
        from trl.trainer.utils import nanstd
    except ImportError as e: lacking(f'{e.name} is not here: `pip install -c constraints.txt trl` compares the numbers with those of TRL')
    tokenizer, folder = make_tokenizer([]), tmp_path_factory.mktemp('reference')
    model = tiny_model(len(tokenizer), 1, 16, 1, 64)
    model.save_pretrained(folder)

    def trainer(model=model, rewards=(lambda completions, **kw: [0.] * len(completions)), rows=12, prompts=3, optimizer=None, callbacks=None, rollout=None, **settings):
        "A real `GRPOTrainer` for batches of some rows; it reads the reference from the folder."
        model.config._name_or_path = str(folder)
        plain = dict(output_dir=str(folder / 'out'), per_device_train_batch_size=rows, gradient_accumulation_steps=1, num_generations=2, max_completion_length=16, max_grad_norm=0., logging_steps=1,
                     use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy='no', disable_tqdm=True, shuffle_dataset=False, lr_scheduler_type='constant')
        t = GRPOTrainer(model, rewards, GRPOConfig(**plain | settings), Dataset.from_list([{'prompt': f'{i}'} for i in range(prompts)]), processing_class=tokenizer,
                        optimizers=(optimizer, None), callbacks=callbacks, rollout_func=rollout)
        t.model.train()
        t.current_gradient_accumulation_steps = t.args.gradient_accumulation_steps   # as its training loop does
        return t
    def rloo(rewards, G):
        "A real `RLOOTrainer` whose answers are given."
        args = RLOOConfig(output_dir=str(folder / 'out'), per_device_train_batch_size=len(rewards), num_generations=G, beta=0., use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy='no', disable_tqdm=True)
        t = RLOOTrainer(model, lambda **kw: rewards, args, Dataset.from_list([{'prompt': '0'}] * len(rewards)), processing_class=tokenizer)
        t._generate = lambda prompts: ([[5]] * len(prompts), [[6, 1]] * len(prompts), [''] * len(prompts))
        return t
    with pytest.MonkeyPatch.context() as m:
        m.setenv('TRL_EXPERIMENTAL_SILENCE', '1')  # rollout_func is called experimental
        gc.freeze()                                # its training ends in a full collection, which need not look at all that was imported
        yield SimpleNamespace(trainer=trainer, rloo=rloo, config=GRPOConfig, tokenizer=tokenizer, nanstd=nanstd)
        gc.unfreeze()
    print('\nlargest difference from TRL, relative:', *(f'{v:.1e} {k}' for k, v in WORST.items()), sep='\n  ')


# --- the loss: the same tensors ---

def batch(seed, dtype, B=12, T=7):
    "Rows of unequal length, with holes, one without any token; log-probabilities now, before and of a reference; good and bad answers."
    g = torch.Generator().manual_seed(seed)
    def rand(*n): return torch.rand(*n, generator=g, dtype=torch.float64).to(dtype)
    def randn(*n): return torch.randn(*n, generator=g, dtype=torch.float64).to(dtype)
    lp, completion, tool = -3 * rand(B, T), (torch.arange(T) < torch.tensor([7, 3, 5, 1, 6, 2] * 2)[:, None]).long(), (rand(B, T) < .7).long()
    tool[:, 0] = 1; tool[1] = 0
    return SimpleNamespace(lp=lp, old=lp + .5 * randn(B, T) + .15 * randn(B, 1), ref=lp + .5 * randn(B, T), adv=randn(B).abs() * torch.tensor([1, -1, -1, 1] * 3), entropy=rand(B, T), slope=None, weights=None, completion=completion, tool=tool, mask=completion * tool)


def cut(x, rows): return SimpleNamespace(**{k: v if v is None else v[rows] for k, v in vars(x).items()})


def entropy_of(x, lp): return x.entropy if x.slope is None else x.entropy + x.slope * lp


def theirs(trainer, x, n_items):
    "TRL's loss, gradient and metrics. The one thing put in its way: the log-probabilities and entropies it would ask its model for are those of the batch."
    lp = x.lp.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kw: (lp, entropy_of(x, lp), None)
    ones = torch.ones(len(lp), 1, dtype=torch.long)
    inputs = dict(prompt_ids=ones, prompt_mask=ones, completion_ids=x.completion, completion_mask=x.completion, tool_mask=x.tool, advantages=x.adv, ref_per_token_logps=x.ref, num_items_in_batch=n_items)
    if x.old is not None: inputs['old_per_token_logps'] = x.old
    trainer.use_vllm = x.weights is not None          # only then does it weigh
    if x.weights is not None: inputs['importance_sampling_ratio'] = x.weights
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, lp)[0], {k: v[-1] for k, v in trainer._metrics['train'].items()}


def ours(x, level='token', beta=0., n_sequences=None, n_tokens=None, **kw):
    lp = x.lp.clone().requires_grad_()
    loss, metrics = grpo_loss(lp, x.old, x.ref if beta else None, x.adv, x.mask, level=level, beta=beta, n_sequences=n_sequences, n_tokens=n_tokens, max_completion_length=16, entropy=entropy_of(x, lp), weights=x.weights, **kw)
    return loss.detach(), torch.autograd.grad(loss, lp)[0], metrics


def settings(level='token', **kw): return kw | {'importance_sampling_level': level}


KINDS = [(k, 'token') for k in LOSS_TYPES] + [('grpo', 'sequence'), ('dapo', 'sequence'), ('dr_grpo', 'sequence'), ('bnpo', 'sequence'), ('cispo', 'sequence'), ('sapo', 'sequence')]  # grpo by sequence is GSPO
GATE = dict(sapo_temperature_pos=.75, sapo_temperature_neg=1.5)      # TRL holds them in float32, in which its 1.05 is 4e-8 off
def fit(kind, **clip): return dict(epsilon_high=1.2) if kind == 'cispo' else GATE if kind == 'sapo' else clip
EXTRAS = {'plain': {}, 'clip-higher': dict(epsilon=.1, epsilon_high=.28), 'delta': dict(epsilon_high=.28, delta=1.5), 'kl': dict(beta=.3, use_bias_correction_kl=False),
          'corrected kl': dict(beta=.3), 'all': dict(epsilon=.1, epsilon_high=.28, delta=1.5, beta=.3)}
CASES = [pytest.param(dict(loss_type=kind, level=level) | extra | (dict(epsilon_high=1.2 if 'epsilon_high' in extra else 5.) if kind == 'cispo' else fit(kind)), id=f'{kind}-{level}-{name}')
         for kind, level in KINDS for name, extra in EXTRAS.items()
         if not (level == 'sequence' and extra.get('beta') and extra.get('use_bias_correction_kl', True))   # a difference, tested below
         and not (kind in ('cispo', 'sapo') and 'delta' in extra)]                                        # have no second clip, in TRL neither

@pytest.mark.parametrize('case', CASES)
def test_same_tensors_same_loss_gradient_and_metrics(trl, case):
    trainer = trl.trainer(**settings(**case))
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for moved in (True, False):
            x = batch(0, dtype)
            if not moved: x.old = None
            loss, grad, metrics = theirs(trainer, x, x.mask.sum())
            loss_, grad_, metrics_ = ours(x, **case)
            check_same(grad_, grad, rel, f'gradient by log-probabilities, {dtype}')
            check_same(loss_, loss, rel, f'loss, {dtype}', size=grad.abs().sum())
            means = mean_metrics([metrics_])
            assert means.keys() == {k for k in metrics if not k.endswith(('_min', '_max'))} and (means.keys() >= {'kl'}) == bool(case.get('beta'))
            for k, v in means.items():
                theirs_ = metrics[k] * 12 / 11 if case['level'] == 'sequence' and 'clip' in k else metrics[k]   # TRL also counts the row without tokens
                check_same(v, theirs_, max(rel, 1e-6), 'metrics', size=1)
            clip = [means[k] for k in ('cispo_clip_ratio', 'clip_ratio/low_mean', 'clip_ratio/high_mean') if k in means]
            if case['loss_type'] == 'sapo': assert not clip
            elif not moved: assert max(clip) == 0, 'on policy nothing is clipped'
            elif case.get('epsilon_high') != 5: assert min(clip) > 0, 'a batch in which tokens are clipped on each side'


@pytest.mark.parametrize('per_window', [3, 1], ids=['accumulated', 'several steps'])
@pytest.mark.parametrize('kind, level', [*KINDS[:len(LOSS_TYPES)], ('grpo', 'sequence')])
def test_same_share_of_the_step_when_a_batch_is_cut(trl, kind, level, per_window):
    "Micro-batches of four rows: three of them make one optimiser step, or each is a step of its own and the sampled tokens of the round are shared out evenly."
    case = dict(loss_type=kind, level=level) | fit(kind, epsilon_high=.28)
    trainer, x = trl.trainer(rows=4, gradient_accumulation_steps=per_window, steps_per_generation=3, **settings(**case)), batch(1, torch.float64)
    n = x.mask.sum()
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        loss, grad, _ = theirs(trainer, cut(x, rows), n)
        loss_, grad_, _ = ours(cut(x, rows), n_sequences=4 * per_window, n_tokens=n * per_window / 3, **case)
        check_same(grad_, grad, 1e-12, 'gradient of a micro-batch, float64')
        check_same(loss_, loss, 1e-12, 'loss of a micro-batch, float64', size=grad.abs().sum())


@pytest.mark.parametrize('kind', LOSS_TYPES)
def test_same_with_an_advantage_for_each_token_and_in_a_batch_without_any_token(trl, kind):
    case = dict(loss_type=kind) | fit(kind, epsilon_high=.28)
    trainer, x = trl.trainer(**settings(**case)), batch(2, torch.float64)
    x.adv = torch.randn(12, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(2):
        loss, grad, _ = theirs(trainer, x, x.mask.sum())
        loss_, grad_, _ = ours(x, **case)
        check_same(grad_, grad, 1e-12, 'gradient, an advantage a token'); check_same(loss_, loss, 1e-12, 'loss, an advantage a token', size=1)
        x.tool, x.mask = x.tool * 0, x.mask * 0


@pytest.mark.parametrize('kind', LOSS_TYPES)
def test_same_entropy_bonus_and_same_weights(trl, kind):
    "Weights of tokens and of sequences, an entropy that has a gradient; TRL's `policy_loss` is the loss without the bonus."
    case = dict(loss_type=kind, beta=.3, entropy_coef=.05) | fit(kind, epsilon_high=.28)
    trainer, x = trl.trainer(**settings(**case)), batch(9, torch.float64)
    x.slope = torch.rand(12, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for shape in ((12, 7), (12, 1)):
        x.weights = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        loss, grad, metrics = theirs(trainer, x, x.mask.sum())
        loss_, grad_, metrics_ = ours(x, **case)
        check_same(grad_, grad, 1e-12, 'gradient, weighed, with a bonus'); check_same(loss_, loss, 1e-12, 'loss, weighed, with a bonus', size=grad.abs().sum())
        means = mean_metrics([metrics_])
        for k, v in means.items(): check_same(v, metrics[k], 1e-6, 'metrics', size=1)
        check_same(loss_ + .05 * means['entropy'], metrics['policy_loss'], 1e-6, 'loss without the bonus', size=1)


def test_the_gate_of_sapo_has_the_same_default_temperatures(trl):
    ours_, theirs_ = inspect.signature(grpo_loss).parameters, {f: trl.config.__dataclass_fields__[f].default for f in GATE}
    assert {f: ours_[f].default for f in GATE} == theirs_


# --- the loss: where ours differs ---

def test_the_bonus_does_not_depend_on_the_cut(trl):
    "TRL's bonus is a mean of the means of micro-batches, so a token of a short row counts more; ours is the mean over the tokens of the step, which is TRL's when nothing is cut."
    x = batch(10, torch.float64)
    x.slope, kw = torch.rand(12, 7, generator=torch.Generator().manual_seed(10), dtype=torch.float64), dict(entropy_coef=1., loss_type='grpo')
    n, rows = x.mask.sum(), [slice(i, i + 4) for i in (0, 4, 8)]
    whole = theirs(trl.trainer(**kw), x, n)[1]
    check_same(torch.cat([ours(cut(x, r), n_sequences=12, n_tokens=n, **kw)[1] for r in rows]), whole, 1e-12, 'gradient of a bonus, cut')
    trainer = trl.trainer(rows=4, gradient_accumulation_steps=3, **kw)
    assert (torch.cat([theirs(trainer, cut(x, r), n)[1] for r in rows]) - whole).abs().max() > .01 * whole.abs().max()


def test_the_kl_of_a_token_is_weighed_by_the_ratio_of_that_token_at_sequence_level_too(trl):
    "TRL takes the sequence's mean ratio there, and the estimate is no longer one of the divergence: a token was sampled with its own probability."
    x = batch(3, torch.float64)
    def grad(**kw): return theirs(trl.trainer(loss_type='grpo', **settings(**kw)), x, x.mask.sum())[1]
    whole, clip, with_kl, without = grad(level='sequence', beta=.3), grad(level='sequence'), grad(beta=.3), grad()
    mine = ours(x, loss_type='grpo', level='sequence', beta=.3)[1]
    check_same(mine, clip + with_kl - without, 1e-12, 'gradient, KL at sequence level')
    assert (mine - whole).abs().max() > .01 * whole.abs().max()


def test_a_token_far_out_of_range_does_not_become_the_whole_gradient(trl):
    "TRL's exponentials overflow in float32; ours are clamped at 20 nats, and what lies beyond has no slope."
    for kw, field in ((dict(), 'old'), (dict(beta=.3, use_bias_correction_kl=False), 'lp')):
        x = batch(4, torch.float32)
        x.adv = -x.adv.abs()
        getattr(x, field)[0, 0] -= 100
        loss, grad, _ = theirs(trl.trainer(**settings(**kw)), x, x.mask.sum())
        loss_, grad_, _ = ours(x, **kw)
        assert not loss.isfinite() and not grad[0, 0].isfinite() and loss_.isfinite() and grad_.isfinite().all()
        grad[0, 0] = grad_[0, 0]
        check_same(grad_, grad, 1e-5, 'gradient beside a token out of range')


def test_what_stands_outside_the_mask_is_not_read(trl):
    "TRL multiplies by the mask, and zero times NaN is NaN: a banned token in a tool's answer (log-probability -inf before and now) would spoil the step."
    x = batch(5, torch.float64)
    rubbish, hole = copy.deepcopy(x), (x.completion * (1 - x.tool)).bool()
    for v in (rubbish.lp, rubbish.old, rubbish.ref): v[hole] = -math.inf
    for kw in (dict(), dict(beta=.3), dict(loss_type='cispo', epsilon_high=5.)):
        trainer = trl.trainer(**kw)
        assert theirs(trainer, rubbish, x.mask.sum())[0].isnan()
        loss, grad, _ = theirs(trainer, x, x.mask.sum())
        loss_, grad_, _ = ours(rubbish, **kw)
        check_same(grad_, grad, 1e-12, 'gradient beside rubbish'); check_same(loss_, loss, 1e-12, 'loss beside rubbish', size=1)


def test_settings_that_clip_what_they_should_let_through_are_refused(trl):
    "TRL takes them: a ceiling below 1 shrinks even the first step, and a delta inside the clip takes the gradient of tokens near the policy that sampled."
    x = batch(6, torch.float64)
    x.old = None
    for wrong, right in ((dict(loss_type='cispo', epsilon_high=.28), dict(loss_type='cispo', epsilon_high=5.)), (dict(epsilon_high=.28, delta=.5), dict(epsilon_high=.28, delta=1.5))):
        small, full = (theirs(trl.trainer(**kw), x, x.mask.sum())[1].abs().sum() for kw in (wrong, right))
        assert small < .9 * full
        with pytest.raises(ValueError, match='—'): ours(x, **wrong)


def test_metrics_do_not_depend_on_the_cut(trl):
    "TRL logs the mean of the means of the micro-batches, so short rows count more; ours is the mean over the tokens of the step, which is TRL's when nothing is cut."
    x = batch(7, torch.float64)
    kw = dict(beta=.3, epsilon_high=.28)
    whole = theirs(trl.trainer(**kw), x, x.mask.sum())[2]
    trainer, parts = trl.trainer(rows=4, **kw), [cut(x, slice(i, i + 4)) for i in (0, 4, 8)]
    for p in parts: theirs(trainer, p, x.mask.sum())
    mine = mean_metrics(ours(p, beta=.3, epsilon_high=.28)[2] for p in parts)
    for k in ('kl', 'entropy', 'clip_ratio/low_mean', 'clip_ratio/high_mean', 'clip_ratio/region_mean'): check_same(mine[k], whole[k], 1e-6, 'metrics of a cut batch')
    assert abs(sum(trainer._metrics['train']['kl']) / 3 - whole['kl']) > .01 * whole['kl']


# --- advantages: the same rewards ---

def scored(trl, columns, G=4, **settings):
    "TRL's advantages and metrics for rewards [P * G], one column for each reward function; generation is replaced by its `rollout_func`."
    n = len(columns[0])
    def rollout(prompts, trainer): return {'prompt_ids': [[5]] * n, 'completion_ids': [[6, 1]] * n, 'logprobs': None}
    t = trl.trainer(rewards=[lambda c=c, **kw: c for c in columns], rows=n, num_generations=G, rollout=rollout, **settings)
    out = t._generate_and_score_completions([{'prompt': str(i // G)} for i in range(n)])
    return out['advantages'].view(-1, G), {k: v[-1] for k, v in t._metrics['train'].items()}


ROWS = [[1., 0., 0., 1.], [.1, .7, .3, 100.], [-3., 2., 2., 2.], [.5, None, .25, 1.], [None, None, 1., 0.], [2.] * 4, [1., None, None, None], [None] * 4]
def flat(rows): return [v for row in rows for v in row]

@pytest.mark.parametrize('scale', [True, False, *SCALES])
def test_same_rewards_same_advantages(trl, scale):
    a, metrics = scored(trl, [flat(ROWS)], scale_rewards=scale)
    mine = group_advantages(ROWS, scale=scale)
    check_same(mine, a, 1e-6, 'advantages')
    assert (a[5:] == 0).all() and (mine[5:] == 0).all()
    r = torch.tensor([[math.nan if v is None else v for v in row] for row in ROWS])
    spread = (trl.nanstd(r) if scale == 'batch' else trl.nanstd(r, dim=1)[:5, None]) + 1e-4 if scale not in (False, 'none') else torch.ones(5, 1)
    check_same((mine[:5] * spread), (r - r.nanmean(1, keepdim=True))[:5].nan_to_num(0), 1e-6, 'advantages times the spread')
    assert metrics['frac_reward_zero_std'] == (0 if scale == 'batch' else 1 / 8)      # with 'batch' TRL asks the spread of the batch
    assert agreeing_groups(ROWS).tolist() == [False] * 5 + [True] * 3   # a group with one answer left, or none, is no group: there is nothing to compare


def test_same_leave_one_out_as_its_rloo(trl):
    a = trl.rloo(flat(ROWS), 4)._generate_and_score_completions([{'prompt': str(i // 4)} for i in range(4 * len(ROWS))])['advantages'].view(-1, 4)
    mine = group_advantages(ROWS, scale='none', leave_one_out=True)
    check_same(mine[:-2], a[:-2], 1e-6, 'advantages, leave one out')
    assert (a[-2:] == 0).all() and (mine[-2:] == 0).all()                              # one answer left, or none


def test_same_punishment_of_long_answers(trl):
    from trl.rewards import get_soft_overlong_punishment
    for cache in (0, 1, 7, 20):
        check_same(soft_overlong_punishment(range(1, 25), 20, cache), get_soft_overlong_punishment(20, cache)([[1] * n for n in range(1, 25)]), 1e-6, 'punishment of long answers')


@pytest.mark.parametrize('mode', SAMPLER_MODES)
@pytest.mark.parametrize('low, high', [(None, 3.), (.7, 1.4), (.7, None)])
def test_same_weights_against_another_engine(trl, mode, low, high):
    "TRL's own scoring of a rollout whose engine gave log-probabilities, one of them missing; the trainer's are given in place of the model's."
    x, n = batch(11, torch.float64, B=12), [7, 3, 5, 1, 6, 2] * 2
    x.tool[1, 0] = 1                                                                   # a row without tokens is a difference: TRL counts its weight of 1
    x.mask, sampled = x.completion * x.tool, x.ref.clone()
    sampled[0, 0] = math.nan
    def rollout(prompts, trainer):
        return {'prompt_ids': [[5]] * 12, 'completion_ids': [[6] * k for k in n], 'env_mask': [row[:k] for row, k in zip(x.tool.tolist(), n)],
                'logprobs': [[None if math.isnan(v) else v for v in row[:k]] for row, k in zip(sampled.tolist(), n)]}
    t = trl.trainer(rollout=rollout, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high)
    t.use_vllm, t._last_loaded_step, t._get_per_token_logps_and_entropies = True, t.state.global_step, lambda *a, **kw: (x.old, None, None)
    w = t._generate_and_score_completions([{'prompt': str(i // 2)} for i in range(12)])['importance_sampling_ratio']
    mine = sampler_weights(x.old, sampled, x.mask, mode, high, low)
    check_same(mine, w, 1e-6, 'weights against another engine')
    theirs_ = {k: v[-1] for k, v in t._metrics['train'].items() if k.startswith('sampling/')}
    means = mean_metrics([sampler_metrics(x.old, sampled, x.mask, mine)])
    assert means.keys() == theirs_.keys()
    for k, v in means.items(): check_same(v, theirs_[k], 1e-6, 'metrics of weights')
    assert (mine.expand(12, 7)[x.mask.bool()] != 1).any() and (mode.endswith('truncate') or (mine == 0).any())


def test_same_advantages_from_several_rewards(trl):
    g = torch.Generator().manual_seed(0)
    r, w = torch.randn(3, 4, 2, generator=g), [1., .5]
    r[1, 2, 0] = math.nan
    columns = [[None if math.isnan(v) else v for v in c] for c in r.flatten(0, 1).T.tolist()]
    a, metrics = scored(trl, columns, multi_objective_aggregation='normalize_then_sum', reward_weights=w)
    check_same(gdpo_advantages(r, w), a, 1e-5, 'advantages from several rewards')
    a, metrics = scored(trl, columns, reward_weights=w)
    check_same(group_advantages((r.nan_to_num(0) * torch.tensor(w)).sum(-1)), a, 1e-5, 'advantages from a weighted sum')


def test_a_group_that_agrees_has_no_phantom_advantage(trl):
    "TRL divides one rounding error by another, and its list of agreeing groups misses them; ours are exactly zero, as there is nothing to learn from them."
    rows = [[c / 10] * 12 for c in range(1, 10)]
    a, metrics = scored(trl, [flat(rows)], G=12)
    assert (a != 0).any() and metrics['frac_reward_zero_std'] < 1
    assert (group_advantages(rows) == 0).all() and agreeing_groups(rows).all()


# --- from tokens and rewards to the gradient of the weights ---

GROUPS = [[(1, 0), (0, 2), (3, 1), (0, 0)], [(0, 1), (1, 1), (2, 0), (1, 0)]]   # two prompts, four answers: the reward of the first and of the second turn

def episodes(trl, groups=GROUPS, failed=(), cut_off=()):
    "Conversations of two turns with a tool's answer between them, of unequal length, as our episodes."
    g, size = torch.Generator().manual_seed(0), len(trl.tokenizer)
    res = []
    for p, group in enumerate(groups):
        context = torch.randint(20, size, (3 + 4 * p,), generator=g).tolist()
        ts = []
        for i, turn_rewards in enumerate(group):
            a, tool, b = (torch.randint(20, size, (int(n),), generator=g).tolist() for n in torch.randint(1, 4, (3,), generator=g))
            ids, mask, late = context + a + tool + b + [9 if (p, i) in cut_off else 1], [0] * len(context) + [1] * len(a) + [0] * len(tool) + [1] * (len(b) + 1), len(context) + len(a) + len(tool)
            seg = Segment(tuple(ids), tuple(mask), (0.,) * len(ids), ((len(context), len(context) + len(a)), (late, len(ids))))
            ts.append(Trajectory(f'{p}/{i}', str(p), i, segments=(seg,), turn_rewards=turn_rewards, truncated=(p, i) in cut_off, error='lost' if (p, i) in failed else None))
        res.append(TrajectoryGroup(str(p), tuple(ts)))
    return res


def their_run(trl, model, groups, micro, lr, rewards=None, **settings):
    "TRL's own training loop on these tokens and rewards: gradient of each update, and what it logs."
    ts, G = [t for g in groups for t in g.trajectories], len(groups[0].trajectories)
    starts = [t.segments[0].turn_spans[0][0] for t in ts]
    def rollout(prompts, trainer):
        return {'prompt_ids': [list(t.segments[0].ids[:n]) for t, n in zip(ts, starts)], 'completion_ids': [list(t.segments[0].ids[n:]) for t, n in zip(ts, starts)], 'logprobs': None,
                'env_mask': [list(t.segments[0].mask[n:]) for t, n in zip(ts, starts)]}
    opt = Recorder(model, lr)
    parts = len(ts) // micro
    t = trl.trainer(model, rewards or (lambda **kw: [None if t.error else t.reward for t in ts]), micro, len(groups), opt, rollout=rollout, num_generations=G, gradient_accumulation_steps=parts,
                    max_steps=settings.get('num_iterations', 1), learning_rate=lr, temperature=.8, **settings)
    t.train()
    return opt.grads, t.state.log_history


def our_run(trl, model, reference, groups, lr, **settings):
    "The same with `learn`."
    config = TrainingConfig(learning_rate=lr, max_completion_length=16, temperature=.8, max_grad_norm=1e9, **settings)
    policy, ref = (Policy(m, trl.tokenizer, CompactFormat(trl.tokenizer)) for m in (model, reference))
    opt = Recorder(model, lr)
    metrics = learn(policy, ref if config.beta else None, opt, groups, config)
    return opt.grads, metrics | play_metrics(groups)


def both(trl, groups, micro=8, lr=1., micro_batch_tokens=10**6, ours_only=None, theirs_only=None, **settings):
    model, reference = tiny_model(len(trl.tokenizer), 0, 16, 1, 64), tiny_model(len(trl.tokenizer), 1, 16, 1, 64)
    a, logs = their_run(trl, copy.deepcopy(model), groups, micro, lr, **settings | (theirs_only or {}))
    b, metrics = our_run(trl, model, reference, groups, lr, micro_batch_tokens=micro_batch_tokens, **settings | (ours_only or {}))
    return a, logs, b, metrics


RUNS = [dict(loss_type='grpo'), dict(loss_type='bnpo'), dict(loss_type='dapo'), dict(loss_type='dr_grpo'), dict(loss_type='cispo', epsilon_high=1.1), dict(loss_type='sapo'), dict(loss_type='grpo', importance_sampling_level='sequence'), dict(beta=.3),
        dict(entropy_coef=.05), dict(scale_rewards='batch'), dict(scale_rewards='none'), dict(delta=1.5, epsilon_high=.28), dict(loss_type='sapo', **GATE), dict(beta=.3, use_bias_correction_kl=False)]

@pytest.mark.parametrize('run', RUNS, ids=lambda r: '-'.join(map(str, r.values())))
def test_same_tokens_and_rewards_same_gradient_of_the_weights(trl, run):
    "Three updates on the same episodes, two of them away from the policy that sampled; in TRL in one piece, in ours in pieces unless the loss depends on them."
    run = dict(loss_type='dapo', epsilon_high=.28) | run
    theirs, logs, mine, metrics = both(trl, episodes(trl), num_iterations=3, micro_batch_tokens=10**6 if run['loss_type'] == 'bnpo' else 40, **run)
    assert len(theirs) == len(mine) == 3 and (theirs[0] - theirs[1]).abs().max() > .1 * theirs[0].abs().max()
    for i in range(3): check_same(mine[i], theirs[i], 1e-5, f'gradient of the weights, update {i + 1}')
    last = logs[0] | logs[2]                     # what the episodes say stands in the first
    shared = [k for k in metrics if k in last and k != 'reward_std']
    clip = {'cispo': {'cispo_clip_ratio'}, 'sapo': set()}.get(run['loss_type'], {'clip_ratio/region_mean'})
    assert {'reward', 'frac_reward_zero_std', 'completions/mean_length', 'completions/clipped_ratio', 'loss', 'grad_norm'} | clip | ({'kl'} if 'beta' in run else set()) <= set(shared)
    for k in shared: check_same(metrics[k], last[k], 1e-5, 'logged metrics', size=1)
    assert all(metrics[k] > 0 for k in clip)


@pytest.mark.parametrize('weights', [[1., 1.], [1., .25]])
def test_same_gradient_from_several_rewards(trl, weights):
    "Each part of the reward compared by itself; one of them missing once. TRL has the parts as reward functions with weights, ours reads them off the episodes."
    groups, lost = episodes(trl), (0, 2)
    def part(t, p, i, k): return None if (p, i) == lost and k == 0 else t.turn_rewards[k]
    columns = [[part(t, p, i, k) for p, g in enumerate(groups) for i, t in enumerate(g.trajectories)] for k in range(2)]
    def split(t, p, i):
        parts = {name: [v, w] for k, (name, w) in enumerate(zip('ab', weights)) if (v := part(t, p, i, k)) is not None}
        return replace(t, info={'rewards': parts}) if weights[1] != 1 else replace(t, components={k: v for k, (v, _) in parts.items()})
    groups = [replace(g, trajectories=tuple(split(t, p, i) for i, t in enumerate(g.trajectories))) for p, g in enumerate(groups)]
    theirs, _, mine, _ = both(trl, groups, num_iterations=2, epsilon_high=.28, multi_objective_aggregation='normalize_then_sum', theirs_only=dict(rewards=[lambda c=c, **kw: c for c in columns], reward_weights=weights))
    for i in range(2): check_same(mine[i], theirs[i], 1e-5, 'gradient of the weights, several rewards')


@pytest.mark.parametrize('kind', LOSS_TYPES)
def test_same_gradient_when_theirs_is_cut_and_a_group_agrees(trl, kind):
    "TRL computes rows without an advantage, in micro-batches of two; ours leaves them out and still counts them. What bnpo is depends on the cut, so it has none."
    theirs, _, mine, _ = both(trl, episodes(trl, [*GROUPS, [(1, 1), (2, 0), (0, 2), (1, 1)]]), micro=12 if kind == 'bnpo' else 2, loss_type=kind, epsilon_high=5. if kind == 'cispo' else .28)
    check_same(mine[0], theirs[0], 1e-5, 'gradient of the weights, cut, a group that agrees')


def test_an_episode_that_is_left_out_is_not_counted_either(trl):
    "Lost or cut episodes teach nothing in both; TRL's means still run over them, which makes the step smaller the more of them there are."
    tokens = [sum(t.segments[0].mask) for g in episodes(trl) for t in g.trajectories]
    theirs, _, mine, _ = both(trl, episodes(trl, failed=[(0, 1)]), loss_type='dapo')
    check_same(mine[0] * (1 - tokens[1] / sum(tokens)), theirs[0], 1e-5, 'gradient of the weights, a lost episode')
    theirs, _, mine, _ = both(trl, episodes(trl, cut_off=[(1, 2)]), loss_type='dapo', mask_truncated_completions=True)
    check_same(mine[0], theirs[0], 1e-5, 'gradient of the weights, a cut episode')     # its tokens are not in TRL's count
    theirs, _, mine, _ = both(trl, episodes(trl, cut_off=[(1, 2)]), loss_type='grpo', mask_truncated_completions=True)
    check_same(mine[0] * 7 / 8, theirs[0], 1e-5, 'gradient of the weights, a cut episode')  # its row is in TRL's


def test_the_spread_we_log_is_the_one_inside_groups(trl):
    "It is what advantages are made of; TRL's metric of the same name is the spread of the whole batch, which also grows when prompts differ."
    groups = episodes(trl)
    r = torch.tensor([g.rewards for g in groups])
    _, logs, _, metrics = both(trl, groups)
    check_same(metrics['reward_std'], trl.nanstd(r, dim=1).mean().item(), 1e-6, 'spread inside groups')
    check_same(logs[0]['reward_std'], trl.nanstd(r).item(), 1e-6, 'spread of the batch')


# --- what TRL does not have: the other estimates of the distance, against verl's formulas ---

def verl(lp, ref, kind):
    "verl's `kl_penalty`: k1 and k2 as they are, k3 clamped; 'k3+' has the value of k3 and the gradient of k2."
    d = lp - ref
    if kind == 'k1': return d
    if kind == 'k2': return .5 * d.square()
    value = ((-d).clamp(-20, 20).exp() - (-d).clamp(-20, 20) - 1).clamp(-10, 10)
    return value if kind == 'k3' else value.detach() + .5 * d.square() - (.5 * d.square()).detach()


def test_the_estimates_of_the_distance_are_verls():
    lp = batch(8, torch.float64).lp.requires_grad_()
    ref = (lp + torch.randn(12, 7, generator=torch.Generator().manual_seed(8), dtype=torch.float64) / 2).detach()
    def slope(y): return torch.autograd.grad(y.sum(), lp)[0]
    for kind in ('k1', 'k2', 'k3'):
        a, b = kl_estimate(lp, ref, kind), verl(lp, ref, kind)
        check_same(a.detach(), b.detach(), 1e-12, 'KL estimates and their slopes'); check_same(slope(a), slope(b), 1e-12, 'KL estimates and their slopes')
    one = (lp - lp.detach()).exp()                     # the ratio on policy
    check_same(slope(kl_penalty(lp, ref, one, 'k2')), slope(verl(lp, ref, 'k3+')), 1e-12, 'KL estimates and their slopes')
    far = torch.tensor(-13., dtype=torch.float64)
    assert verl(far, far * 0, 'k3') == 10 and kl_estimate(far, far * 0) > 4e5   # verl cuts the value, and with it the slope, at 10; ours only what would overflow
