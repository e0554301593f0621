"""Properties of the mathematics, for inputs nobody picked."""
import math
import hypothesis, pytest, torch
from hypothesis import strategies as st
from stateset_nb.grpo import (LEVELS, LOSS_TYPES, SAMPLER_MODES, SCALES, adapt_beta, agreeing_groups, aggregate, anchor_advantages, clipped_surrogate, clipped_tokens, entropy_from_logits, gdpo_advantages,
                              group_advantages, grpo_loss, kept_groups, kl_estimate, mean_metrics, number_states, pad_turns, returns_to_go, sampler_metrics, sampler_weights, sapo_surrogate, selected_logps,
                              soft_overlong_punishment, turn_advantages)

def given(*args): return lambda f: hypothesis.settings(max_examples=MANY, deadline=None)(hypothesis.given(*args)(f))

MANY = 40
seeds = st.integers(0, 2**32 - 1)
NAN, INF = math.nan, math.inf
GLOBAL = [k for k in LOSS_TYPES if k != 'bnpo']

def fit(kind, **kw): return dict(loss_type=kind, max_completion_length=16) | kw | (dict(epsilon_high=1.2, delta=None) if kind == 'cispo' else dict(delta=None) if kind == 'sapo' else {})


def batch(seed, B=6, T=9, per_token=False, moved=.3):
    "A batch in which every row has a token: log-probs, old, reference, advantages, mask."
    g = torch.Generator().manual_seed(seed)
    lp = -3 * torch.rand(B, T, generator=g)
    old, ref = lp + moved * torch.randn(B, T, generator=g), lp + .5 * torch.randn(B, T, generator=g)
    mask = (torch.rand(B, T, generator=g) < .6).float()
    mask[torch.arange(B), torch.randint(0, T, (B,), generator=g)] = 1
    return lp, old, ref, torch.randn(B, T, generator=g) if per_token else torch.randn(B, generator=g), mask


def loss_and_grad(lp, *rest, **kw):
    lp = lp.detach().clone().requires_grad_()
    loss, metrics = grpo_loss(lp, *rest, **kw)
    return loss.detach(), torch.autograd.grad(loss, lp)[0], metrics


def check_same(a, b, rel=1e-6, size=0.):
    "Equal within `rel` of the largest entry, or of `size`: how large the terms were that a sum was made of."
    assert (a - b).abs().max() <= rel * max(b.abs().max().item(), float(size), 1e-30), (a, b)


# --- advantages ---

groups = st.integers(2, 16).flatmap(lambda n: st.lists(st.lists(st.floats(-100, 100, width=32), min_size=n, max_size=n), min_size=1, max_size=5))

@given(groups, st.sampled_from([True, False, *SCALES]), st.booleans())
def test_advantages_sum_to_zero(rows, scale, loo):
    a = group_advantages(rows, scale=scale, leave_one_out=loo)
    assert a.isfinite().all()
    assert (a.sum(-1).abs() <= 1e-4 * (1 + a.abs().amax(-1))).all()


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 33), st.sampled_from([0., 1e-8, 1e-6, 1e-4]), st.booleans(), st.sampled_from(SCALES))
def test_a_group_that_agrees_has_exactly_no_advantage(c, n, eps, loo, scale):
    r = torch.full((2, n), c)
    assert (group_advantages(r, eps=eps, scale=scale, leave_one_out=loo) == 0).all()
    assert agreeing_groups(r).all()
    k = torch.stack([r, 3 * r], -1)
    assert (gdpo_advantages(k, eps=eps) == 0).all()
    assert (turn_advantages(k, torch.full((2, n), 2), eps=eps, scale=scale) == 0).all()
    if scale != 'batch': assert (anchor_advantages(k, torch.full((2, n), 2), torch.tensor([0, 1]).expand(2, n, 2), gamma=0, eps=eps, scale=scale) == 0).all()


@given(st.floats(-1e3, 1e3, width=32), seeds)
def test_agreeing_groups_stay_zero_beside_others_in_gdpo(c, seed):
    r = torch.cat([torch.full((3, 4, 2), c), torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(seed))])
    a = gdpo_advantages(r)
    assert (a[:3] == 0).all() and a[3:].abs().max() > 0


@given(st.integers(2, 8).flatmap(lambda n: st.lists(st.integers(-20, 20), min_size=n, max_size=n)), st.floats(.01, 100), st.floats(-50, 50))
def test_scaled_advantages_do_not_know_the_scale(row, by, plus):
    r = torch.tensor([row], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(by * r + plus, eps=0) if len(set(row)) > 1 else r * 0, group_advantages(r, eps=0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(group_advantages(r + plus, scale=False), group_advantages(r, scale=False), rtol=1e-6, atol=1e-9)


@given(st.lists(st.one_of(st.none(), st.floats(-10, 10, width=32)), min_size=2, max_size=10), st.sampled_from(SCALES), st.booleans())
def test_a_lost_answer_is_as_if_it_had_not_been(row, scale, loo):
    a, kept = group_advantages([row], scale=scale, leave_one_out=loo)[0], [v for v in row if v is not None]
    assert all(x == 0 for x, v in zip(a.tolist(), row) if v is None)
    got = [x for x, v in zip(a.tolist(), row) if v is not None]
    assert got == pytest.approx(group_advantages([kept], scale=scale, leave_one_out=loo)[0].tolist() if len(kept) > 1 else [0] * len(kept), rel=1e-5, abs=1e-6)


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_leave_one_out_is_the_mean_of_the_others(rows):
    a = group_advantages(rows, scale='none', leave_one_out=True)
    for got, row in zip(a.tolist(), rows): assert got == pytest.approx([v - (sum(row) - v) / 3 for v in row], rel=1e-4, abs=1e-4)


def test_scale_takes_the_words_of_trl_and_its_old_true_and_false():
    r = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(group_advantages(r, scale=True), group_advantages(r, scale='group')) and torch.equal(group_advantages(r, scale=False), group_advantages(r, scale='none'))
    torch.testing.assert_close(group_advantages(r, scale='batch'), (r - r.mean(1, keepdim=True)) / (r.std() + 1e-4))
    torch.testing.assert_close(group_advantages(r[:1], scale='batch'), group_advantages(r[:1]))                    # a batch of one group
    for f in (lambda s: group_advantages(r, scale=s), lambda s: turn_advantages(r[..., None], torch.ones(3, 4), scale=s)):
        with pytest.raises(ValueError, match='expected one of group, batch, none'): f('all')


@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=1, max_size=12), st.integers(1, 5))
def test_kept_groups_are_the_first_that_do_not_agree(rows, number):
    keep, teach = kept_groups(rows, number).tolist(), [i for i, r in enumerate(rows) if len(set(r)) > 1]
    assert [i for i, k in enumerate(keep) if k] == teach[:number] and kept_groups(rows).sum() == len(teach)
    assert (group_advantages(rows)[~kept_groups(rows)] == 0).all()                                                 # what is dropped taught nothing


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(1, 200), st.data())
def test_the_soft_punishment_is_the_papers_three_cases(lengths, limit, data):
    cache = data.draw(st.integers(0, limit))
    want = [0 if n <= limit - cache else (limit - cache - n) / cache if n <= limit else -1 for n in lengths]
    assert soft_overlong_punishment(lengths, limit, cache).tolist() == pytest.approx(want, abs=1e-6)


@given(seeds)
def test_the_order_of_siblings_does_not_matter(seed):
    g = torch.Generator().manual_seed(seed)
    r, order = torch.randn(3, 7, generator=g), torch.randperm(7, generator=g)
    torch.testing.assert_close(group_advantages(r[:, order]), group_advantages(r)[:, order])
    turns, n = torch.randn(3, 7, 4, generator=g), torch.randint(0, 5, (3, 7), generator=g)
    states = torch.randint(0, 3, turns.shape, generator=g)
    for scale in (True, False): torch.testing.assert_close(anchor_advantages(turns[:, order], n[:, order], states[:, order], scale=scale), anchor_advantages(turns, n, states, scale=scale)[:, order])
    for scale in SCALES: torch.testing.assert_close(turn_advantages(turns[:, order], n[:, order], scale=scale), turn_advantages(turns, n, scale=scale)[:, order])


@pytest.mark.parametrize('bad', [torch.zeros(8), torch.zeros(3, 1), [[1., INF]], [[1., 2.], [1.]]])
def test_rewards_that_are_no_groups_are_refused(bad):
    with pytest.raises(ValueError, match='—'): group_advantages(bad)


def test_the_spread_is_bessels_like_trl():
    r = torch.tensor([[.1, .7, .3, .9, .2]])
    torch.testing.assert_close(group_advantages(r), (r - r.mean()) / (r.std(correction=1) + 1e-4))


def test_gdpo_equals_the_papers_formula_with_its_batch_mean():
    r = torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([1., .5, 2.])
    s = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4) * w).sum(-1)
    torch.testing.assert_close(gdpo_advantages(r, w), (s - s.mean()) / (s.std() + 1e-4), rtol=1e-4, atol=1e-5)


# --- turns ---

episodes = st.lists(st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=4), min_size=3, max_size=3), min_size=1, max_size=3)

@given(episodes, st.floats(0, 1))
def test_turn_advantages_are_the_formula_in_plain_python(rows, gamma):
    a = turn_advantages(*pad_turns(rows), gamma=gamma, scale=False)
    for p, group in enumerate(rows):
        ret = [[sum(gamma ** (k - t) * e[k] for k in range(t, len(e))) for t in range(4)] for e in group]
        for i, e in enumerate(group):
            for t in range(a.size(-1)):
                want = ret[i][t] - sum(r[t] for r in ret) / 3 if t < len(e) else 0
                assert a[p, i, t].item() == pytest.approx(want, abs=1e-4)


@given(episodes, st.floats(0, 1), st.floats(0, 2), seeds)
def test_anchor_advantages_are_the_formula_in_plain_python(rows, gamma, omega, seed):
    g = torch.Generator().manual_seed(seed)
    keys = [[[f's{int(torch.randint(0, 3, (), generator=g))}' for _ in e] for e in group] for group in rows]
    a = anchor_advantages(*pad_turns(rows), number_states(keys), gamma=gamma, omega=omega, scale=False)
    for p, group in enumerate(rows):
        ret = [[sum(gamma ** (k - t) * e[k] for k in range(t, len(e))) for t in range(len(e))] for e in group]
        mean = sum(map(sum, group)) / 3
        for i, e in enumerate(group):
            for t in range(a.size(-1)):
                same = [ret[j][k] for j in range(3) for k in range(len(group[j])) if t < len(e) and keys[p][j][k] == keys[p][i][t]]
                want = sum(e) - mean + omega * (ret[i][t] - sum(same) / len(same)) if t < len(e) else 0
                assert a[p, i, t].item() == pytest.approx(want, abs=1e-4)


@given(episodes, st.integers(1, 3))
def test_anchor_advantages_do_not_read_past_the_end_and_know_no_other_group(rows, more):
    r, n = pad_turns(rows)
    s = number_states([[[t % 2 for t, _ in enumerate(e)] for e in group] for group in rows])
    whole = anchor_advantages(r, n, s)
    long = torch.nn.functional.pad(r, (0, more), value=NAN)
    long[..., :r.size(-1)][torch.arange(r.size(-1)) >= n[..., None]] = NAN
    torch.testing.assert_close(anchor_advantages(long, n, torch.nn.functional.pad(s, (0, more)))[..., :r.size(-1)], whole)
    for p in range(len(rows)): torch.testing.assert_close(anchor_advantages(r[p:p + 1], n[p:p + 1], s[p:p + 1] + 7), whole[p:p + 1])


def test_turns_of_one_state_at_one_time_are_compared_as_turns_are():
    "Where all siblings are in the same state at the same turn, the step part is turn_advantages without its spread."
    r, n = pad_turns([[[1, 0, 2], [0, 3, 1], [2, 2, 0]]])
    s = torch.arange(3).expand(1, 3, 3)
    part = anchor_advantages(r, n, s, gamma=.5, scale=False) - anchor_advantages(r, n, s, omega=0, scale=False)
    torch.testing.assert_close(part, turn_advantages(r, n, gamma=.5, scale=False))
    with pytest.raises(ValueError, match='state -1'): anchor_advantages(r, n, s - 1)


@given(episodes, st.integers(1, 3))
def test_turn_advantages_do_not_read_past_the_end(rows, more):
    r, n = pad_turns(rows)
    rubbish = torch.full((*n.shape, more), NAN)
    long = torch.cat([r, rubbish], -1)
    long[..., :r.size(-1)][torch.arange(r.size(-1)) >= n[..., None]] = NAN
    torch.testing.assert_close(turn_advantages(long, n)[..., :r.size(-1)], turn_advantages(r, n))


@given(episodes)
def test_a_failed_or_unscored_episode_changes_nothing_for_the_others(rows):
    whole = turn_advantages(*pad_turns(rows))
    failed = turn_advantages(*pad_turns([g + [None] for g in rows]))
    torch.testing.assert_close(failed[:, :3], whole)
    r, n = pad_turns([g + [[1] * 4] for g in rows])
    r[:, 3, 2] = NAN
    unscored = turn_advantages(r, n)
    torch.testing.assert_close(unscored[:, :3, :whole.size(-1)], whole)
    assert (unscored[:, 3] == 0).all()
    states = number_states([[['here'] * len(e) for e in g] + [['here'] * 4] for g in rows])
    among = anchor_advantages(r, n, states)
    torch.testing.assert_close(among[:, :3, :whole.size(-1)], anchor_advantages(*pad_turns(rows), states[:, :3, :whole.size(-1)]))
    assert (among[:, 3] == 0).all()


@given(st.integers(2, 8).flatmap(lambda n: st.lists(st.floats(-10, 10, width=32), min_size=n, max_size=n)), st.integers(1, 4))
def test_an_outcome_only_reward_gives_every_turn_the_same(row, k):
    a = turn_advantages(*pad_turns([[[0.] * (k - 1) + [v] for v in row]]))
    torch.testing.assert_close(a, group_advantages([row])[..., None].expand_as(a), rtol=1e-4, atol=1e-5, check_dtype=False)


def test_returns_to_go_is_not_an_integer_division():
    assert returns_to_go(torch.tensor([1., 1., 1.]), .5).tolist() == [1.75, 1.5, 1.]


# --- log-probabilities ---

@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.sampled_from([.5, 1., 1.7]))
def test_selected_logps_and_their_gradient_are_those_of_log_softmax(seed, B, T, V, temperature):
    g = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(B, T, V, generator=g, dtype=torch.float64)).requires_grad_()
    ids, w = torch.randint(0, V, (B, T), generator=g), torch.randn(B, T, generator=g, dtype=torch.float64)
    plain, ours = (z / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1), selected_logps(z, ids, temperature)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad((x * w).sum(), z)[0] for x in (ours, plain)))


def test_pieces_cover_more_than_one_piece(monkeypatch):
    import stateset_nb.grpo as grpo
    monkeypatch.setitem(grpo._PIECE, 'cpu', 70)         # 10 rows of 7
    z = torch.randn(5, 9, 7, dtype=torch.float64, requires_grad=True)
    for part in (z, z[:, :-1], z[:3], z.transpose(0, 1), z[0]):
        ids = torch.randint(0, 7, part.shape[:-1])
        ours, plain = selected_logps(part, ids), part.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), z)[0] for x in (ours, plain)))
        torch.testing.assert_close(entropy_from_logits(part), torch.distributions.Categorical(logits=part).entropy())


def test_half_precision_logits_give_float32_values_and_a_half_precision_gradient():
    z = torch.randn(2, 3, 11).bfloat16().requires_grad_()
    ids = torch.randint(0, 11, (2, 3))
    lp = selected_logps(z, ids)
    lp.sum().backward()
    assert lp.dtype == torch.float32 and z.grad.dtype == torch.bfloat16
    torch.testing.assert_close(lp, z.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1))


def test_the_entropy_of_a_banned_vocabulary_has_a_finite_gradient():
    z = torch.tensor([[1., 2., -INF]], requires_grad=True)
    entropy_from_logits(z).sum().backward()
    assert z.grad.isfinite().all()


# --- ratio, clip, distance ---

@given(seeds, st.floats(.01, .5), st.floats(.01, .5))
def test_at_ratio_one_the_clip_is_not_there(seed, low, high):
    a = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    lp = torch.zeros(20, requires_grad=True)
    y = clipped_surrogate(lp.exp(), a, low, high, delta=2.)
    assert torch.equal(y.detach(), a)
    assert torch.equal(torch.autograd.grad(y.sum(), lp)[0], a)


@given(seeds, st.floats(.05, .5), st.floats(.05, .5))
def test_the_clip_takes_the_gradient_exactly_where_it_is_counted(seed, low, high):
    g = torch.Generator().manual_seed(seed)
    q = (3 * torch.rand(50, generator=g)).requires_grad_()
    a = torch.randn(50, generator=g)
    y = clipped_surrogate(q, a, low, high)
    slope, = torch.autograd.grad(y.sum(), q)
    below, above = clipped_tokens(q.detach(), a, low, high)
    assert torch.equal(slope == 0, below | above)
    assert (y <= q * a + 1e-6).all()


@given(seeds, st.floats(.1, 10), st.floats(.1, 10))
def test_the_soft_gate_is_the_policy_gradient_at_ratio_one_and_closes_on_both_sides(seed, pos, neg):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(20, generator=g)
    def slope(q): q.requires_grad_(); return torch.autograd.grad(sapo_surrogate(q, a, pos, neg).sum(), q)[0]
    one = slope(torch.ones(20))
    torch.testing.assert_close(one, a)
    near, far = (slope(1 + d * torch.randn(20, generator=torch.Generator().manual_seed(seed))) for d in (.1, .5))
    assert (near.abs() <= one.abs() + 1e-6).all() and (far.abs() <= near.abs() + 1e-6).all() and (far * a >= 0).all()


@given(seeds, st.sampled_from(SAMPLER_MODES), st.floats(1, 4), st.sampled_from([None, .2, .8]))
def test_sampler_weights_are_the_formula_in_plain_python(seed, mode, high, low):
    old, played, _, _, mask = batch(seed, moved=1.)
    played[0, 0] = NAN
    w = sampler_weights(old, played, mask, mode, high, low).expand_as(old)
    for i, row in enumerate(mask.tolist()):
        d = [(old - played)[i, t].item() if m and not played[i, t].isnan() else 0. for t, m in enumerate(row)]
        for t in range(len(row)):
            q = math.exp(sum(d) if mode.startswith('sequence') else d[t])
            if min(abs(q - high), abs(q - (low or 0))) < 1e-5: continue                                            # on the bound: either is right
            assert w[i, t].item() == pytest.approx(min(max(q, low or 0), high) if mode.endswith('truncate') else q if (low or 0) <= q <= high else 0, rel=1e-4)


@given(seeds, st.sampled_from(SAMPLER_MODES), st.sampled_from([(2, 4), (3, 3), (1, 2, 3)]))
def test_sampler_weights_and_their_metrics_know_neither_padding_nor_the_cut(seed, mode, sizes):
    old, played, _, _, mask = batch(seed, moved=1.)
    played[0, 0] = NAN
    w = sampler_weights(old, played, mask, mode)
    def pad(x, v): return torch.nn.functional.pad(x, (2, 3), value=v)
    padded = sampler_weights(pad(old, NAN), pad(played, -INF), pad(mask, 0.), mode)
    assert padded.isfinite().all() and torch.allclose(padded if w.size(1) == 1 else padded[:, 2:-3], w)
    whole = mean_metrics([sampler_metrics(old, played, mask, w)])
    assert mean_metrics([sampler_metrics(pad(old, NAN), pad(played, -INF), pad(mask, 0.), padded)]) == pytest.approx(whole, rel=1e-5)
    assert mean_metrics(sampler_metrics(*x) for x in zip(*(y.split(sizes) for y in (old, played, mask, w)))) == pytest.approx(whole, rel=1e-5)


def test_weights_against_another_engine_have_no_gradient():
    old, played, _, _, mask = batch(0)
    assert not sampler_weights(old.requires_grad_(), played, mask).requires_grad


@given(st.floats(1e-4, 10), st.floats(0, 10), st.floats(1e-3, 1), st.floats(0, 1))
def test_beta_moves_towards_the_target_and_never_far(beta, kl, target, rate):
    b = adapt_beta(beta, kl, target, rate)
    assert abs(b / beta - 1) <= .2 * rate + 1e-9 and (b - beta) * (kl - target) >= 0


@given(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32))
def test_k2_and_k3_are_never_negative(lp, ref):
    for kind in ('k2', 'k3'):
        assert kl_estimate(torch.tensor(lp), torch.tensor(ref), kind) >= 0
        assert kl_estimate(torch.tensor(lp), torch.tensor(lp), kind) == 0


# --- the loss ---

options = st.fixed_dictionaries(dict(loss_type=st.sampled_from(LOSS_TYPES), level=st.sampled_from(LEVELS), beta=st.sampled_from([0., .1]),
                                     kl=st.sampled_from(['k1', 'k2', 'k3']), epsilon_high=st.sampled_from([None, .28]), delta=st.sampled_from([None, 2.]))).map(lambda o: fit(o.pop('loss_type'), **o))

@given(seeds, options, st.integers(0, 5), st.integers(0, 5))
def test_padding_on_either_side_changes_nothing(seed, kw, left, right):
    lp, old, ref, adv, mask = batch(seed)
    def pad(x, v): return torch.nn.functional.pad(x, (left, right), value=v)
    a, ga, ma = loss_and_grad(lp, old, ref, adv, mask, **kw)
    b, gb, mb = loss_and_grad(pad(lp, NAN), pad(old, INF), pad(ref, -INF), adv, pad(mask, 0.), **kw)
    check_same(b, a, size=ga.abs().sum()); check_same(gb, pad(ga, 0.))
    assert (gb[:, :left] == 0).all() and (gb[:, left + lp.size(1):] == 0).all()
    assert mean_metrics([ma]) == pytest.approx(mean_metrics([mb]), rel=1e-5, abs=1e-6)


@given(seeds, options)
def test_the_order_of_rows_changes_nothing(seed, kw):
    parts = batch(seed)
    order = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(seed))
    a, ga, _ = loss_and_grad(*parts, **kw)
    b, gb, _ = loss_and_grad(*(x[order] for x in parts), **kw)
    check_same(b, a, size=ga.abs().sum()); check_same(gb, ga[order])


@given(seeds, options.filter(lambda o: o['loss_type'] in GLOBAL), st.sampled_from([(1, 1, 1, 1, 1, 1), (2, 4), (3, 3), (5, 1), (1, 2, 3)]), st.booleans())
def test_the_cut_into_micro_batches_changes_nothing(seed, kw, sizes, per_token):
    parts = batch(seed, per_token=per_token and kw['level'] == 'token')
    kw = kw | dict(n_sequences=6, n_tokens=parts[-1].sum())
    a, ga, ma = loss_and_grad(*parts, **kw)
    cut = [loss_and_grad(*micro, **kw) for micro in zip(*(x.split(sizes) for x in parts))]
    check_same(sum(c[0] for c in cut), a, size=ga.abs().sum())
    check_same(torch.cat([c[1] for c in cut]), ga)
    assert mean_metrics(c[2] for c in cut) == pytest.approx(mean_metrics([ma]), rel=1e-5, abs=1e-6)


def extras(seed, lp, mode='token_truncate'):
    "Weights against another engine and an entropy that depends on the log-probabilities."
    g = torch.Generator().manual_seed(seed + 1)
    return torch.rand(lp.shape if mode == 'token_truncate' else (len(lp), 1), generator=g) * 2, torch.rand(lp.shape, generator=g)


def full_loss(lp, old, ref, adv, mask, weights, slopes, **kw):
    "Loss and gradient where the entropy is -slopes * log-probability."
    lp = lp.detach().clone().requires_grad_()
    loss, metrics = grpo_loss(lp, old, ref, adv, mask, weights=weights, entropy=-slopes * lp, entropy_coef=.1, **kw)
    return loss.detach(), torch.autograd.grad(loss, lp)[0], metrics


@given(seeds, options, st.sampled_from(['token_truncate', 'sequence_mask']), st.sampled_from([(1, 1, 1, 1, 1, 1), (2, 4), (1, 2, 3)]), st.integers(0, 3))
def test_weights_and_the_bonus_know_neither_the_cut_nor_padding_nor_the_order(seed, kw, mode, sizes, more):
    parts = batch(seed)
    parts = (*parts, *extras(seed, parts[0], mode))
    kw = kw | dict(n_sequences=6, n_tokens=parts[4].sum())
    a, ga, ma = full_loss(*parts, **kw)
    if kw['loss_type'] in GLOBAL:
        cut = [full_loss(*micro, **kw) for micro in zip(*(x.split(sizes) for x in parts))]
        check_same(sum(c[0] for c in cut), a, size=ga.abs().sum()); check_same(torch.cat([c[1] for c in cut]), ga)
        assert mean_metrics(c[2] for c in cut) == pytest.approx(mean_metrics([ma]), rel=1e-5, abs=1e-6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    b, gb, _ = full_loss(*(x[order] for x in parts), **kw)
    check_same(b, a, size=ga.abs().sum()); check_same(gb, ga[order])
    def pad(x, v): return x if x.dim() == 1 or x.size(1) == 1 else torch.nn.functional.pad(x, (more, 1), value=v)
    c, gc, _ = full_loss(*(pad(x, v) for x, v in zip(parts, (NAN, INF, -INF, 0, 0, NAN, 0))), **kw)
    check_same(c, a, size=ga.abs().sum()); check_same(gc, pad(ga, 0.))


@given(seeds, options)
def test_weights_of_one_and_no_coefficient_change_nothing(seed, kw):
    parts = batch(seed)
    a, ga, ma = loss_and_grad(*parts, **kw)
    b, gb, mb = loss_and_grad(*parts, weights=torch.ones(6, 1), entropy=torch.ones(6, 9), **kw)
    assert torch.equal(a, b) and torch.equal(ga, gb) and mean_metrics([mb]) == mean_metrics([ma]) | {'entropy': 1.}


@pytest.mark.parametrize('kind', LOSS_TYPES)
def test_weights_multiply_the_gain_of_a_token_and_the_bonus_means_the_same_for_every_loss(kind):
    lp, old, ref, adv, mask = batch(4)
    w, _ = extras(4, lp)
    kw = fit(kind, beta=.1)
    plain, weighed = loss_and_grad(lp, old, None, adv, mask, **fit(kind))[1], loss_and_grad(lp, old, None, adv, mask, weights=w, **fit(kind))[1]
    check_same(weighed, w * plain)
    check_same(loss_and_grad(lp, old, ref, adv, mask, weights=w, **kw)[1] - weighed, loss_and_grad(lp, old, ref, adv, mask, **kw)[1] - plain, rel=1e-5)   # not the distance
    x = lp.clone().requires_grad_()
    h, = torch.autograd.grad(grpo_loss(x, old, None, adv, mask, entropy=x, entropy_coef=.5, **fit(kind))[0], x)
    check_same(h - plain, -.5 * mask / mask.sum(), rel=1e-5)


@given(seeds, options)
def test_rubbish_outside_the_mask_has_exactly_no_gradient(seed, kw):
    lp, old, ref, adv, mask = batch(seed)
    out = mask == 0
    lp2, old2, ref2 = lp.masked_fill(out, NAN), old.masked_fill(out, INF), ref.masked_fill(out, -INF)
    a, ga, _ = loss_and_grad(lp, old, ref, adv, mask, **kw)
    b, gb, _ = loss_and_grad(lp2, old2, ref2, adv, mask, **kw)
    assert torch.equal(a, b) and torch.equal(ga, gb) and (gb[out] == 0).all() and gb.isfinite().all()
    if kw['level'] == 'token':
        c, gc, _ = loss_and_grad(lp2, old2, ref2, adv[:, None].expand_as(lp).masked_fill(out, NAN), mask.bool(), **kw)
        assert torch.equal(a, c) and torch.equal(ga, gc)


@given(seeds, st.sampled_from(LOSS_TYPES))
def test_on_policy_the_gradient_is_the_policy_gradient(seed, kind):
    lp, _, _, adv, mask = batch(seed)
    _, ga, metrics = loss_and_grad(lp, None, None, adv, mask, **fit(kind))
    x = lp.clone().requires_grad_()
    plain, = torch.autograd.grad(aggregate(-adv[:, None] * x, mask, kind, max_completion_length=16), x)
    check_same(ga, plain)
    assert set(mean_metrics([metrics]).values()) <= {0.}


def test_an_inner_nan_is_not_hidden():
    lp, old, ref, adv, mask = batch(0)
    lp[mask.bool()] = NAN
    assert grpo_loss(lp, old, ref, adv, mask)[0].isnan()


def test_a_row_without_tokens_is_no_division_by_zero():
    lp, old, ref, adv, mask = batch(0)
    mask[0] = 0
    for kind in LOSS_TYPES:
        for level in LEVELS:
            a, ga, metrics = loss_and_grad(lp, old, ref, adv, mask, level=level, **fit(kind))
            assert a.isfinite() and (ga[0] == 0).all()
            assert all(v[1] == (mask.sum() if level == 'token' else 5) for k, v in metrics.items() if 'clip' in k)
        assert loss_and_grad(lp, old, ref, adv, mask * 0, **fit(kind))[0] == 0


def test_cispo_weighs_the_policy_gradient_and_never_silences_a_token():
    lp, old, _, adv, mask = batch(2, moved=2.)
    _, ga, metrics = loss_and_grad(lp, old, None, adv, mask, loss_type='cispo', epsilon_high=1.5)
    check_same(ga, -(lp - old).exp().clamp(max=1.5) * adv[:, None] * mask / mask.sum())
    assert (ga[mask.bool()] != 0).all() and 0 < mean_metrics([metrics])['cispo_clip_ratio'] < 1
    for wrong in (dict(epsilon_high=.28), dict(), dict(epsilon_high=5., delta=6.)):
        with pytest.raises(ValueError, match='—'): grpo_loss(lp, old, None, adv, mask, loss_type='cispo', **wrong)


def test_with_beta_zero_the_distance_is_measured_and_not_trained_on():
    lp, old, ref, adv, mask = batch(3)
    a, ga, metrics = loss_and_grad(lp, old, ref, adv, mask)
    b, gb, none = loss_and_grad(lp, old, None, adv, mask)
    assert torch.equal(a, b) and torch.equal(ga, gb) and 'kl' not in none and mean_metrics([metrics])['kl'] > 0


def test_the_gradient_is_exact():
    lp, old, ref, adv, mask = (x.double() for x in batch(1, B=2, T=4, moved=.1))
    def check(**kw): return torch.autograd.gradcheck(lambda x: grpo_loss(x, old, ref, adv, mask, epsilon=.5, **kw)[0], lp.clone().requires_grad_())
    assert check(loss_type='sapo') and check(loss_type='sapo', level='sequence', sapo_temperature_neg=3.)
    assert check(beta=.1) and check(level='sequence') and check(beta=.1, kl='k1', loss_type='grpo') and check(beta=.1, use_bias_correction_kl=False)
