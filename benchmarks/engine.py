"""Our GRPO step beside TRL's, in one process and in turn: the same weights, prompts, sampling, rewards and loss.

    python benchmarks/engine.py                 # every case (long)
    python benchmarks/engine.py --case training --case memory    # cases whose names begin so; results are merged with those that are there
    python benchmarks/engine.py --quick         # the small model, few repeats, for `make bench`
    python benchmarks/engine.py --smoke         # tiny settings: does it run at all?
    python benchmarks/engine.py --threads 2     # torch's threads, 1 unless given; results of other than 1 stand in lines of their own

The full bench writes benchmarks/results/engine.{json,md,png}; --quick and --smoke write to benchmarks/results/tmp.

How the work is made equal. All sides load the same weights, drawn from one seed, in float32, and get the same prompts in the same order; all sample at temperature 1 from the whole vocabulary,
and take one AdamW step on the same loss (dapo, beta 0, one iteration). What is said is decided by weights and by no sampler's option, so nobody is patched:
- fixed lengths: a frozen bias of the head, -100 on the end token, so that no turn ends before its limit;
- realistic lengths: that bias is such that the mean length is about 45 tokens;
- calls of tools: the rows of the embedding and the last layer's MLP are written so that after a prompt the model says `<tool_call>...</tool_call><|im_end|>` token by token, its words drawn from eight at each place.
  TRL parses, runs and answers it as `tools=` does, ours as an environment with tools does.
TRL runs inside its own `train()`; a callback gives the others their turn between two of its steps, so its time is all that it spends from one step's end to the next one's.
It has per_device_train_batch_size = one group with accumulation, which is faster on a CPU than the whole round at once. No gradient checkpointing, no bf16.
"""
import argparse, asyncio, gc, itertools, json, math, os, platform, resource, string, subprocess, sys, tempfile, time, warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
import transformers.cache_utils

import stateset_nb
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend, Tool
from stateset_nb.core import Message, Scenario, write_text
from stateset_nb.environments import ConversationEnvironment, Step
from stateset_nb.policy import Policy
from stateset_nb.rewards import RewardFunction, RewardResult
from stateset_nb.trainers import MultiTurnGRPOTrainer, SingleTurnGRPOTrainer, TrainingConfig, learn, pick_scenarios

HERE = Path(__file__).parent
SIZES = {'0.66M': (128, 2), '3.67M': (256, 4)}  # name -> (width, layers); 2,048 tokens, four heads, tied embeddings

# ---- the model and what it says

AGREE = ' agree'
END, PAD, START = '<|im_end|>', '<|endoftext|>', '<|im_start|>'
OPEN, HEAD, TAIL, CLOSE = '<tool_call>', '\n{"name": "look_up", "arguments": {"order": "', '"}}\n', '</tool_call>'
SPLIT = r'\n+| ?[A-Za-z_]+| +|[^\sA-Za-z_]+'

def look_up(order: str) -> str:
    """Look an order up.

    Args:
        order: The order.

    Returns:
        What is known.
    """
    return ''.join(words()[sum(order.encode()) % 97:][:9])

@cache
def words(n: int = 1400) -> list[str]:
    "Words that are tokens of their own, each with its space."
    rng = np.random.default_rng(0)
    return [' ' + ''.join(rng.choice(list(string.ascii_lowercase), 6)) for _ in range(n)]

def chat_template() -> str:
    "Qwen3's, as TRL ships it."
    from trl.chat_template_utils import qwen3_chat_template
    return qwen3_chat_template

def tokenizer(size: int = 2048):
    "A tokenizer of the given size: the bytes, the words of the chat template, and words of its own."
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    template = chat_template()
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(p for w in words() for p, _ in pre.pre_tokenize_str(w))]
    pieces += [p for p, _ in pre.pre_tokenize_str(template.replace('\\n', '\n').replace('\\"', '"') + json.dumps(Tool(look_up).schema) + AGREE)]
    special = [PAD, START, END, OPEN, CLOSE, '<tool_response>', '</tool_response>', '<think>', '</think>', HEAD, TAIL]
    pieces = list(dict.fromkeys(pieces))
    letters = string.ascii_lowercase
    pieces += ['Ġ' + ''.join(c) + '_' for c in itertools.islice(itertools.product(letters, repeat=4), size - len(special) - len(pieces))]
    assert len(pieces) + len(special) == size, (len(pieces), size)
    tok = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], ignore_merges=True))
    tok.pre_tokenizer, tok.decoder = pre, decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True) for t in special[:3]])
    tok.add_tokens([AddedToken(t, normalized=False) for t in special[3:]])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=PAD, eos_token=END, chat_template=template, clean_up_tokenization_spaces=False)

def model_of(size: str | tuple[int, int], tok, ends: float = 0., max_tokens: int = 2048):
    """A model of Qwen3's shape. A frozen bias of its head, as some models have one, keeps three control tokens from being sampled, and gives the end token about the
    chance `ends` at every place: with 0 no turn ever ends by itself. Weights, not a sampler's option, so that every side samples and learns with it."""
    width, layers = SIZES[size] if isinstance(size, str) else size
    torch.manual_seed(0)
    m = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=len(tok), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=width // 4, max_position_embeddings=max_tokens, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)).eval()
    m.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tok)), requires_grad=False)
    with torch.no_grad():
        m.get_input_embeddings().weight[tok.pad_token_id] = .02 * torch.randn(width)
        m.lm_head.bias[tok.convert_tokens_to_ids([PAD, START, OPEN, END])] = -100.
        asked = torch.tensor(tok.apply_chat_template([{'role': 'user', 'content': ''.join(words()[:50])}], add_generation_prompt=True, tokenize=True)['input_ids'])
        ids = torch.cat([asked.expand(8, -1), torch.randint(2000, (8, 64))], 1)
        z = m(input_ids=ids, logits_to_keep=64).logits
        odds = (z[..., tok.eos_token_id] + 100 - z.logsumexp(-1)).flatten()  # what they are without the bias
        if ends: m.lm_head.bias[tok.eos_token_id] = math.log(ends) + (-odds).exp().mean().log()
    return m

def write_calls(m, tok, length: int) -> None:
    "Write into the weights what a model says after a prompt: a call of `length` tokens with its end token, its words drawn from eight at each place. The last layer knows at which place of the call a token stands, and asks for the next."
    pool, inside = words()[100:], length - 5
    places = [tok.encode('\n'), [tok.convert_tokens_to_ids(OPEN)], [tok.convert_tokens_to_ids(HEAD)],
              *(tok.convert_tokens_to_ids([w.replace(' ', 'Ġ') for w in pool[8 * j:8 * j + 8]]) for j in range(inside)), [tok.convert_tokens_to_ids(TAIL)], [tok.convert_tokens_to_ids(CLOSE)], [tok.eos_token_id]]
    width, last = m.config.hidden_size, m.model.layers[-1].mlp
    assert len(places) <= min(width, m.config.intermediate_size) and all(len(p) in (1, 8) for p in places), [len(p) for p in places]
    with torch.no_grad():
        m.lm_head.bias.zero_()
        table = m.get_input_embeddings().weight
        for j, ids in enumerate(places):
            table[ids] = .02 * torch.randn(len(ids), width)
            table[ids, j] += 26 / width ** .5
        n = len(places) - 1
        for p, scale in ((last.gate_proj.weight, 1.), (last.up_proj.weight, 1.)):
            p[:n] = 0
            p[range(n), range(n)] = scale
        last.down_proj.weight[:, :n] = 0
        last.down_proj.weight[range(1, n + 1), range(n)] = 1.

# ---- the work

def prompt(tok, n: int, i: int, tools=None, first: str = '') -> str:
    "A question that is `n` tokens long as the chat template writes it."
    rng = np.random.default_rng(i)
    render = lambda text: len(tok.apply_chat_template([{'role': 'user', 'content': text}], tools=tools, add_generation_prompt=True, tokenize=True)['input_ids'])
    text = first + ''.join(rng.choice(words(), n - render(first)))
    assert render(text) == n, (render(text), n)
    return text

def worth(question: str, answer: str) -> float:
    "What an answer is worth; in groups whose question begins with ' agree' all are worth the same."
    return 1. if question.startswith(AGREE) else sum(answer.encode()) % 101 / 100

@dataclass(frozen=True)
class Work:
    "What one round is, for everybody."
    size: str | tuple[int, int]       # of `SIZES`, or width and layers
    P: int = 8                        # prompts a round
    G: int = 8                        # answers of each
    prompt: int = 64                  # tokens
    length: int = 64                  # tokens of a turn at most; of exactly so many where turns > 1 (with the end token)
    turns: int = 1                    # above 1 with a tool's answer of 22 tokens after each but the last
    ends: float = 0.                  # chance of the end token at each place; 0 never
    agree: float = 0.                 # part of the groups that agree on the reward
    vocabulary: int = 2048
    wait: float = 0.                  # seconds a tool takes; asynchronous
    seed: int = 0

    @property
    def rounds(self) -> int:
        "Rounds until the prompts begin again."
        return 16

    def tokenizer(self): return tokenizer(self.vocabulary)

    def model(self, tok):
        "The same weights each time."
        m = model_of(self.size, tok, self.ends, max_tokens=max(512, 2 * (self.prompt + self.turns * (self.length + 24))))
        if self.turns > 1: write_calls(m, tok, self.length)
        return m

    def questions(self, tok, tools=None) -> list[str]:
        "Every round has its part of groups that agree, on average."
        share = [int((k + 1) * self.P * self.agree + 1e-9) - int(k * self.P * self.agree + 1e-9) for k in range(self.rounds)]
        return [prompt(tok, self.prompt, 10_000 * self.seed + k * self.P + i, tools, AGREE if i < n else '') for k, n in enumerate(share) for i in range(self.P)]

    @property
    def tokens(self) -> int:
        "Tokens a round samples at most."
        return self.P * self.G * self.length * self.turns

    @property
    def unique(self) -> int:
        "Tokens that a round really has: each prompt once, each completion once (at full length)."
        return self.P * (self.prompt + self.G * (self.turns * self.length + (self.turns - 1) * 22))

OUT: list[tuple[float, float]] = []  # when each asynchronous tool began and ended

def the_tool(wait: float):
    "The tool that is called: asynchronous where it takes time."
    if not wait: return look_up
    async def look_up_slowly(order: str) -> str:
        began = time.perf_counter()
        await asyncio.sleep(wait)
        OUT.append((began, time.perf_counter()))
        return look_up(order)
    look_up_slowly.__name__, look_up_slowly.__doc__ = 'look_up', look_up.__doc__
    return look_up_slowly

def time_out() -> float:
    "Seconds in which at least one tool was out, since the last time this was asked."
    total, until = 0., -math.inf
    for a, b in sorted(OUT):
        total, until = total + max(0., b - max(a, until)), max(until, b)
    OUT.clear()
    return total

# ---- ours

class Worth(RewardFunction):
    async def compute_reward(self, turns, context=None) -> RewardResult:
        last = turns[-1]
        return RewardResult(worth(next(t for t in turns if t.role == 'user').text, last.text + ''.join(c.parsed()['order'] for c in last.tool_calls)))

class Desk(ConversationEnvironment):
    "Answers calls, and ends after so many turns."
    last = 4
    async def step(self, message: Message) -> Step:
        return await super().step(message) if self.turns < self.last - 1 else Step(terminated=True)

class Ours:
    "Our trainer, a round at a time."
    def __init__(self, w: Work, **settings) -> None:
        tok = w.tokenizer()
        tools = [Tool(the_tool(w.wait))] if w.turns > 1 else []
        questions = w.questions(tok, [t.schema for t in tools] or None)
        self.config = TrainingConfig(num_episodes=10**6, prompts_per_step=w.P, num_generations=w.G, max_completion_length=w.length if w.turns == 1 else 2 * w.length, learning_rate=1e-6, epsilon_high=.2, **settings)
        scenarios = [Scenario(f'{i}', (Message('user', t),)) for i, t in enumerate(questions)]
        self.policy = Policy(w.model(tok), tok)
        env = Desk(scenarios, tools=tools)
        env.last = w.turns
        self.trainer = (MultiTurnGRPOTrainer if w.turns > 1 else SingleTurnGRPOTrainer)(Agent(AgentConfig('bench'), PolicyBackend(self.policy)), env, Worth(), self.config, scenarios=scenarios)
        self.order = [int(s.id) for k in range(w.rounds) for s in pick_scenarios(scenarios, k, self.config)]  # for the peer: the same in the same order
        self.loop, self.rounds = asyncio.new_event_loop(), self.trainer.steps()

    def __call__(self) -> dict[str, float]:
        "A round: play, learn, record."
        m = self.loop.run_until_complete(anext(self.rounds))
        return {'tokens': m['completions/mean_length'], 'agree': m['frac_reward_zero_std'], 'loss': m['loss'], 'play_s': m['time/rollout'], 'learn_s': m['time/update']}

    def play(self):
        "Only the episodes of a round."
        async def go():
            if self.trainer.policy is None: await self.trainer.initialize()
            return await self.trainer.play()
        return self.loop.run_until_complete(go())

# ---- TRL

class Peer:
    "TRL's trainer in its own training loop; between two of its steps others get their turn."
    def __init__(self, w: Work, order: Sequence[int] | None = None, rollout=None, model=None, optimizer=None, rows: int | None = None, rewards=None, **settings) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        tok = w.tokenizer()
        tools = [the_tool(w.wait)] if w.turns > 1 else None
        questions = w.questions(tok, tools)
        B = w.P * w.G
        self.folder = tempfile.TemporaryDirectory()
        settings = dict(output_dir=self.folder.name, per_device_train_batch_size=rows or B, gradient_accumulation_steps=B // (rows or B), num_generations=w.G, learning_rate=1e-6, lr_scheduler_type='constant',
            max_completion_length=w.length if w.turns == 1 else 2 * w.turns * (w.length + 22), max_tool_calling_iterations=w.turns - 1 if w.turns > 1 else None, max_steps=10**6, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to=[], save_strategy='no', disable_tqdm=True, shuffle_dataset=False) | settings
        def reward(prompts, completions, **kw): return [worth(p[0]['content'], self.said(c)) for p, c in zip(prompts, completions)]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            config = GRPOConfig(**settings)
        self.trainer = GRPOTrainer(model if model is not None else w.model(tok), rewards or reward, config, Dataset.from_list([{'prompt': [{'role': 'user', 'content': questions[i]}]} for i in order or range(len(questions))]),
                                   processing_class=tok, tools=tools, rollout_func=rollout, optimizers=(optimizer, None))
        self.trainer.remove_callback(transformers.trainer_callback.PrinterCallback)

    def said(self, completion) -> str:
        last = completion[-1]
        return last['content'] + ''.join(c['function']['arguments']['order'] for c in last.get('tool_calls') or [])

    def run(self, steps: int, between: Callable[[float, float, dict[str, float]], None] = lambda *a: None) -> None:
        "Train; `between` is told the wall and CPU seconds of each step and what was logged of it."
        this = self.trainer
        class Between(transformers.TrainerCallback):
            def on_train_begin(self, *args, **kw): self.mark = clocks()
            def on_step_end(self, args, state, control, **kw):
                wall, cpu = (b - a for a, b in zip(self.mark, clocks()))
                m = this._metrics['train']
                between(wall, cpu, {'tokens': m['completions/mean_length'][-1], 'agree': m['frac_reward_zero_std'][-1]})
                control.should_training_stop = state.global_step >= steps
                self.mark = clocks()
        this.add_callback(Between())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            this.train()

# ---- no framework at all

class Flat(transformers.cache_utils.Cache):
    "Keys and values in buffers made once."
    is_compileable = False
    def __init__(self) -> None:
        super().__init__(layers=[])
        self.k, self.v, self.n = {}, {}, 0

    def fill(self, cache, G: int, columns: int) -> None:
        "From a prefilled cache, each row G times."
        for i, l in enumerate(cache.layers):
            for store, x in ((self.k, l.keys), (self.v, l.values)):
                store[i] = x.new_zeros(len(x) * G, x.shape[1], columns, x.shape[3])
                store[i][:, :, :x.shape[2]] = x.repeat_interleave(G, 0)
        self.n = cache.get_seq_length()

    def keep(self, rows: torch.Tensor) -> None:
        for store in (self.k, self.v):
            for i, x in store.items(): store[i] = x[rows]

    def update(self, keys, values, layer, *args, **kw):
        hi = self.n + keys.shape[2]
        for store, x in ((self.k, keys), (self.v, values)): store[layer][:, :, self.n:hi] = x
        return self.k[layer][:, :, :hi], self.v[layer][:, :, :hi]

    def get_seq_length(self, layer_idx: int = 0) -> int: return self.n

class Bare:
    "The same round as plain code over the same model: prompts read once, flat keys and values, finished rows dropped, completions trained behind a shared prompt, groups that agree left out."
    def __init__(self, w: Work, order: Sequence[int] | None = None) -> None:
        self.w, self.tok = w, w.tokenizer()
        tools = [look_up] if w.turns > 1 else None
        questions = w.questions(self.tok, tools)
        self.model = w.model(self.tok)
        self.questions = [questions[i] for i in order or range(len(questions))]
        self.prompts = [self.tok.apply_chat_template([{'role': 'user', 'content': q}], tools=tools, add_generation_prompt=True, tokenize=True)['input_ids'] for q in self.questions]
        self.opt, self.step, self.random = torch.optim.AdamW(self.model.parameters(), 1e-6, weight_decay=0.), 0, torch.Generator().manual_seed(0)

    def draw(self, z: torch.Tensor) -> torch.Tensor:
        cdf = z.softmax(-1).cumsum(-1)
        return torch.searchsorted(cdf, torch.rand(len(z), 1, generator=self.random) * cdf[:, -1:]).clamp(max=z.shape[-1] - 1).squeeze(-1)

    def reply(self, said: list[int]) -> list[int]:
        order = json.loads(self.tok.decode(said).split(OPEN)[1].split(CLOSE)[0])['arguments']['order']
        return self.tok.encode(f'\n{START}user\n<tool_response>\n{look_up(order)}\n</tool_response>{END}\n{START}assistant\n')

    @torch.inference_mode()
    def play(self, prompts: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        "Completions and their masks."
        w, m, end = self.w, self.model, self.tok.eos_token_id
        first = m(input_ids=prompts, use_cache=True, logits_to_keep=1)
        cache, B = Flat(), len(prompts) * w.G
        cache.fill(first.past_key_values, w.G, prompts.shape[1] + w.turns * (w.length + 24))
        z, said, mask = first.logits[:, -1].repeat_interleave(w.G, 0), [[] for _ in range(B)], [[] for _ in range(B)]
        for turn in range(w.turns):
            rows, live, begin = list(range(B)), set(range(B)), [len(s) for s in said]  # whose rows the buffers hold, and who still speaks
            for left in reversed(range(w.length)):
                x = self.draw(z)
                for i, t in zip(rows, x.tolist()):
                    if i in live: said[i].append(t); mask[i].append(1)
                live = {i for i in live if said[i][-1] != end}
                if not live or not left: break
                if len(live) < .75 * len(rows):
                    at = torch.tensor([k for k, i in enumerate(rows) if i in live])
                    cache.keep(at)
                    x, rows = x[at], [i for i in rows if i in live]
                z = m(input_ids=x[:, None], past_key_values=cache, position_ids=torch.full((len(x), 1), cache.n), attention_mask={'full_attention': None}, use_cache=True).logits[:, -1]
                cache.n += 1
            if turn == w.turns - 1: break
            new = [self.reply(s[b:]) for s, b in zip(said, begin)]
            ids = torch.tensor([[s[-1], *t] for s, t in zip(said, new)])
            for i, t in enumerate(new): said[i] += t; mask[i] += [0] * len(t)
            T = ids.shape[1]
            see = torch.ones(T, cache.n + T, dtype=torch.bool).tril(cache.n)[None, None]
            z = m(input_ids=ids, past_key_values=cache, position_ids=cache.n + torch.arange(T)[None], attention_mask={'full_attention': see}, use_cache=True, logits_to_keep=1).logits[:, -1]
            cache.n += T
        return said, mask

    def learn(self, prompts: torch.Tensor, said, mask, rewards: torch.Tensor) -> float:
        "The loss of a step, with all groups that do not agree, some at a time."
        w, n, total = self.w, sum(map(sum, mask)), 0.
        a = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        todo = [p for p in range(len(prompts)) if rewards[p].max() > rewards[p].min()]
        per = max(1, 8192 // (w.G * max(map(len, said))))
        for part in [todo[i:i + per] for i in range(0, len(todo), per)]:
            rows = [p * w.G + g for p in part for g in range(w.G)]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(said[r]) for r in rows], batch_first=True)
            want = torch.nn.utils.rnn.pad_sequence([torch.tensor(mask[r]) for r in rows], batch_first=True).bool()
            out = self.model.base_model(input_ids=prompts[part], use_cache=True)
            cache = out.past_key_values
            cache.batch_repeat_interleave(w.G)
            h = self.model.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
            h = torch.cat([out.last_hidden_state[:, -1:].repeat_interleave(w.G, 0), h], 1)
            lp = -torch.nn.functional.cross_entropy(self.model.lm_head(h[want]), ids[want], reduction='none')
            each = a[part].flatten().repeat_interleave(want.sum(1))
            ratio = (lp - lp.detach()).exp()
            loss = -torch.minimum(ratio * each, ratio.clamp(.8, 1.2) * each).sum() / n
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.opt.step(); self.opt.zero_grad(set_to_none=True)
        return total

    def __call__(self) -> dict[str, float]:
        "A round."
        w, at = self.w, self.step * self.w.P % len(self.prompts)
        self.step += 1
        prompts = torch.tensor(self.prompts[at:at + w.P])
        said, mask = self.play(prompts)
        text = [self.tok.decode(s[max((i for i, k in enumerate(m) if not k), default=-1) + 1:], skip_special_tokens=True) for s, m in zip(said, mask)]
        rewards = torch.tensor([worth(self.questions[at + i // w.G], t) for i, t in enumerate(text)]).view(w.P, w.G)
        loss = self.learn(prompts, said, mask, rewards)
        return {'tokens': sum(map(sum, mask)) / len(said), 'agree': (rewards.amax(1) == rewards.amin(1)).float().mean().item(), 'loss': loss}

# ---- measuring

def clocks() -> tuple[float, float]: return time.perf_counter(), time.process_time()

def interleave(w: Work, repeats: int, bare: bool = True) -> dict[str, list[tuple[float, float, dict]]]:
    "(wall seconds, CPU seconds, what was logged) of each round of each side, in turn; the first round of each is not counted."
    ours, seen = Ours(w), {'ours': [], 'peer': [], 'bare': []}
    peer, plain = Peer(w, ours.order, rows=w.G), Bare(w, ours.order) if bare else None
    def clocked(name: str, f: Callable[[], dict]) -> None:
        gc.collect()
        a = clocks()
        m = f()
        b = clocks()
        seen[name].append((b[0] - a[0], b[1] - a[1], m | {'out_s': time_out()}))
    def between(wall: float, cpu: float, m: dict) -> None:
        seen['peer'].append((wall, cpu, m | {'out_s': time_out()}))
        clocked('ours', ours)
        if plain is not None: clocked('bare', plain)
        gc.collect()
    peer.run(repeats + 1, between)
    return {k: v[1:] for k, v in seen.items() if v}

def alternate(sides: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    "(wall, CPU) seconds of each side, in turn; the first of each is not counted."
    wall, cpu = ({k: [] for k in sides} for _ in range(2))
    for _ in range(repeats + 1):
        for k, f in sides.items():
            gc.collect()
            a = clocks(); f(); b = clocks()
            wall[k].append(b[0] - a[0]); cpu[k].append(b[1] - a[1])
    return tuple({k: v[1:] for k, v in t.items()} for t in (wall, cpu))

def cpu_part(cpu: dict[str, Sequence[float]]) -> dict:
    "What a record says of CPU seconds."
    told = {k: spread(v) for k, v in cpu.items()}
    return {'cpu': told, 'cpu_ratio': round(told['peer']['median'] / told['ours']['median'], 2)}

def spread(values: Sequence[float]) -> dict[str, float]:
    "Median, minimum and quartiles, four digits."
    q1, q2, q3 = np.percentile(values, [25, 50, 75])
    return {k: float(f'{v:.4g}') for k, v in {'median': q2, 'min': min(values), 'q1': q1, 'q3': q3}.items()} | {'n': len(values)}

def record(case: str, times: dict[str, Sequence[float]], goal: float | None, aim: float | None = None, unit: str = 's', **more) -> dict:
    "A line of the results: medians of interleaved repeats, their ratio, and how far the repeats lie apart."
    each = [b / a for a, b in zip(times['ours'], times['peer'])]
    told = {k: spread(v) for k, v in times.items()} | {'ratio': spread(each)}
    ratio = told['peer']['median'] / told['ours']['median']
    return {'case': case, **{k: told[k]['median'] for k in ('ours', 'peer', 'bare') if k in told}, 'unit': unit, 'ratio': round(ratio, 2), 'goal': goal, 'met': None if goal is None else bool(ratio >= goal), 'aim': aim,
            'spread': told, 'versions': versions(), 'machine': machine()} | more

def step_case(case: str, w: Work, repeats: int, goal: float | None, aim: float | None = None, bare: bool = True) -> dict:
    "Whole rounds of ours, of TRL, and of a bare loop."
    seen = interleave(w, repeats, bare)
    mean = lambda who, k: round(float(np.mean([m[k] for _, _, m in seen[who]])), 3)
    did = {k: {'tokens an answer': mean(k, 'tokens'), 'groups that agree': mean(k, 'agree')} for k in seen}
    if not w.ends and any(d['tokens an answer'] != w.length * w.turns for d in did.values()): sys.exit(f'{case}: the sides did not do the same work: {did}')
    r = record(case, {k: [t for t, _, _ in v] for k, v in seen.items()}, goal, aim, did=did, **cpu_part({k: [c for _, c, _ in v] for k, v in seen.items()}), work=asdict(w),
               ours_play=spread([m['play_s'] for _, _, m in seen['ours']]), ours_learn=spread([m['learn_s'] for _, _, m in seen['ours']]))
    return r | {'same_update': same_update(replace(w, P=min(w.P, 2)))}

class Recorder(torch.optim.SGD):
    "An optimizer that keeps the gradient and changes nothing."
    def __init__(self, model) -> None:
        super().__init__(model.parameters(), 1e-12)
        self.model = model
    def step(self, closure=None):
        self.grad = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.requires_grad]).clone()

def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    "Relative distance, by norm."
    return float(f'{((a.double() - b.double()).norm() / b.double().norm()).item():.2e}')

def same_update(w: Work) -> float:
    "How far TRL's gradient is from ours on the same episodes: relative, by norm."
    ours = Ours(w)
    groups, mine = ours.play(), Recorder(ours.policy.model)
    learn(ours.policy, None, mine, groups, replace(ours.config, max_grad_norm=1e9))
    ts = [t for g in groups for t in g.trajectories]
    lo = [t.segments[0].turn_spans[0][0] for t in ts]
    parts = {'prompt_ids': [list(t.segments[0].ids[:n]) for t, n in zip(ts, lo)], 'completion_ids': [list(t.segments[0].ids[n:]) for t, n in zip(ts, lo)], 'logprobs': None, 'env_mask': [list(t.segments[0].mask[n:]) for t, n in zip(ts, lo)]}
    model = w.model(w.tokenizer())
    theirs = Recorder(model)
    Peer(replace(w, turns=1), rollout=lambda prompts, trainer: parts, model=model, optimizer=theirs, rows=w.G, rewards=lambda **kw: [t.reward for t in ts], max_grad_norm=0.).run(1)
    return apart(mine.grad, theirs.grad)

# ---- the cases

def waiting_case(case: str, w: Work, repeats: int) -> dict:
    "How long a round has tools out: all at once, or one after the other."
    runs = {wait: interleave(replace(w, wait=wait), repeats, bare=False) for wait in (.05, 0.)}
    rounds = {wait: {who: spread([t for t, _, _ in v]) for who, v in seen.items()} for wait, seen in runs.items()}
    return record(case, {who: [m['out_s'] for _, _, m in v] for who, v in runs[.05].items()}, 20., 32., unit='s in which a tool is out', work=asdict(w), least=.05 * (w.turns - 1),
                  rounds={f'{who}, tools of {wait} s': v for wait, r in rounds.items() for who, v in r.items()}, round_ratio=round(rounds[.05]['peer']['median'] / rounds[.05]['ours']['median'], 2),
                  longer={who: round(rounds[.05][who]['median'] - rounds[0.][who]['median'], 3) for who in ('ours', 'peer')})

def training_case(case: str, w: Work, repeats: int) -> dict:
    "An update from the same episodes: `learn`, and the same model with one padded row for each completion and the logits of whole rows."
    ours = Ours(w)
    groups = ours.play()
    rows = [(t.segments[0].ids, t.segments[0].turn_spans[0][0]) for g in groups for t in g.trajectories]
    rewards = torch.tensor([g.rewards for g in groups])
    a = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    n = sum(len(i) - lo for i, lo in rows)
    def hf(model, opt) -> None:
        for at in range(0, len(rows), w.G):
            part = rows[at:at + w.G]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i, _ in part], batch_first=True)
            want = torch.zeros_like(ids, dtype=torch.bool)
            for k, (i, lo) in enumerate(part): want[k, lo:len(i)] = True
            lp = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            ratio, each = (lp - lp.detach()).exp(), a[at:at + w.G, None].to(lp.dtype)
            (-(torch.minimum(ratio * each, ratio.clamp(.8, 1.2) * each) * want[:, 1:]).sum() / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        opt.step(); opt.zero_grad(set_to_none=True)
    model = w.model(w.tokenizer())
    mine, theirs, exact = Recorder(ours.policy.model), Recorder(model), Recorder(w.model(w.tokenizer()).double())
    config = replace(ours.config, max_grad_norm=1e9)
    wall, cpu = alternate({'ours': lambda: learn(ours.policy, None, mine, groups, config), 'peer': lambda: hf(model, theirs)}, repeats)
    hf(exact.model, exact)
    return record(case, wall, 3., 4.2, work=asdict(w), **cpu_part(cpu), gradient_error=apart(mine.grad, theirs.grad), gradient_error_to_float64={'ours': apart(mine.grad, exact.grad), 'peer': apart(theirs.grad, exact.grad)})

def rollout_case(case: str, w: Work, repeats: int) -> dict:
    "Only the conversations: ours (`play` of the trainer, which is `rollouts`), `model.generate` over the whole history at each turn, and the bare loop."
    ours = Ours(w)
    plain, other = Bare(w, ours.order), Bare(w, ours.order)
    sampling = transformers.GenerationConfig(do_sample=True, temperature=1., top_k=0, top_p=1., max_new_tokens=2 * w.length, eos_token_id=plain.tok.eos_token_id, pad_token_id=plain.tok.pad_token_id)
    def generate():
        rows, sampled = [p for p in other.prompts[:w.P] for _ in range(w.G)], 0
        for turn in range(w.turns):
            n = max(map(len, rows))
            ids = torch.tensor([[plain.tok.pad_token_id] * (n - len(r)) + list(r) for r in rows])
            mask = torch.tensor([[0] * (n - len(r)) + [1] * len(r) for r in rows])
            out = other.model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)[:, n:].tolist()
            said = [o[:o.index(plain.tok.eos_token_id) + 1] for o in out]
            sampled += sum(map(len, said))
            rows = [[*r, *s, *(other.reply(s) if turn < w.turns - 1 else [])] for r, s in zip(rows, said)]
        return sampled
    def bare(): return sum(map(sum, plain.play(torch.tensor(plain.prompts[:w.P]))[1]))
    def mine(): return sum(sum(s.mask) for g in ours.play() for t in g.trajectories for s in t.segments)
    def check(who: str, f: Callable[[], int]) -> Callable[[], None]:
        def run() -> None:
            if (n := f()) != w.tokens: sys.exit(f'{case}: {who} sampled {n} tokens — expected {w.tokens}')
        return run
    wall, cpu = alternate({who: check(who, f) for who, f in (('ours', mine), ('peer', generate), ('bare', bare))}, repeats)
    return record(case, wall, 3., 4.3, work=asdict(w), **cpu_part(cpu))

# ---- a process for each point: time and memory

def resident(fresh: bool = False) -> float:
    "The highest resident memory of this process so far, MB; `fresh` begins anew with what is resident now, where the system (Linux) can."
    status = Path('/proc/self/status')
    if not status.is_file(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 1024)
    if fresh:
        try: Path('/proc/self/clear_refs').write_text('5')
        except OSError: pass
    return int(status.read_text().split('VmHWM:')[1].split()[0]) / 1024

def point(spec: dict) -> dict:
    "What one process measures: rounds of one side, its seconds and its peak of memory."
    w, who = Work(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec['work'].items()}), spec['who']
    if who == 'peer': import datasets, trl  # noqa: F401
    base = resident(fresh=True)
    seen: list[tuple[float, float, dict]] = []
    if who == 'peer': Peer(w, rows=spec.get('rows')).run(spec['repeats'] + 1, lambda *a: seen.append(a))
    else:
        ours = Ours(w)
        for _ in range(spec['repeats'] + 1):
            a = clocks(); m = ours(); b = clocks()
            seen.append((b[0] - a[0], b[1] - a[1], m))
    return {'seconds': spread([t for t, _, _ in seen[1:]]), 'cpu': spread([c for _, c, _ in seen[1:]]), 'peak_mb': round(resident(), 1), 'base_mb': round(base, 1)} | (
        {k: spread([m[f'{k}_s'] for _, _, m in seen[1:]]) for k in ('play', 'learn')} if who == 'ours' else {})

def ask(who: str, w: Work, repeats: int, rows: int | None = None) -> dict:
    "`point` in a process of its own."
    spec = json.dumps({'who': who, 'work': asdict(w), 'repeats': repeats, 'rows': rows, 'threads': torch.get_num_threads()})
    out = subprocess.run([sys.executable, __file__, '--point', spec], capture_output=True, text=True)
    if out.returncode: sys.exit(f'a measuring process failed:\n{out.stderr[-2000:]}')
    return json.loads(out.stdout.splitlines()[-1])

def slope(x: Sequence[float], y: Sequence[float]) -> float:
    "The exponent of a power law through the points."
    return round(float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0]), 3)

def growth_case(case: str, works: dict[int, Work], repeats: int) -> dict:
    "Time and memory of our round as one size grows, against the tokens it really has: each prompt once, each completion once."
    points = [{'at': x, 'unique_tokens': w.unique} | ask('ours', w, repeats) for x, w in works.items()]
    tokens = [p['unique_tokens'] for p in points]
    own = lambda p: max(.1, p['peak_mb'] - p['base_mb'])
    fit = {'seconds': slope(tokens, [p['cpu']['median'] for p in points]), 'play': slope(tokens, [p['play']['median'] for p in points]), 'learn': slope(tokens, [p['learn']['median'] for p in points]), 'memory': slope(tokens, [own(p) for p in points])}
    return {'case': case, 'ours': fit['seconds'], 'peer': None, 'unit': 'exponent of CPU seconds in unique tokens', 'ratio': None, 'goal': None, 'met': None, 'spread': {}, 'versions': versions(), 'machine': machine(), 'exponents': fit, 'points': points}

def memory_case(case: str, w: Work, repeats: int) -> dict:
    "Peak of resident memory above that of the imports, each side in a process of its own."
    ours = ask('ours', w, repeats)
    cuts = {f'{rows} rows': ask('peer', w, repeats, rows) for rows in (w.P * w.G, w.G)}
    own = lambda p: max(.1, p['peak_mb'] - p['base_mb'])
    best = min(cuts.values(), key=own)
    ratio = own(best) / own(ours)
    return {'case': case, 'ours': round(own(ours), 1), 'peer': round(own(best), 1), 'unit': 'MB above imports', 'ratio': round(ratio, 2), 'goal': 1., 'met': bool(ratio >= 1), 'spread': {}, 'versions': versions(), 'machine': machine(), 'processes': {'ours': ours, **cuts}, 'work': asdict(w)}

def versions() -> dict[str, str]:
    from importlib.metadata import version
    return {'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__, 'trl': version('trl'), 'stateset_nb': stateset_nb.__version__}

@cache
def _cpu() -> str:
    info = Path('/proc/cpuinfo')
    return next((l.partition(':')[2].strip() for l in info.read_text().splitlines() if l.startswith('model name')), platform.processor()) if info.is_file() else platform.processor()

def machine() -> dict: return {'cpu': _cpu(), 'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'load': round(os.getloadavg()[0], 1), 'system': platform.system(), 'date': time.strftime('%Y-%m-%d')}

# ---- which cases, and what is told of them

def cases(mode: str, repeats: int | None = None) -> dict[str, Callable[[], dict]]:
    "Every case by name."
    n = lambda full: repeats or {'full': full, 'quick': 3, 'smoke': 1}[mode]
    small = mode == 'smoke'
    step = Work((16, 1), P=2, G=4, prompt=24, length=10) if small else Work('0.66M')
    real = replace(step, length=20, ends=.2, agree=.5) if small else replace(step, length=256, ends=1 / 48, agree=.5625)
    calls = replace(step, prompt=232, turns=3) if small else replace(step, prompt=246, length=65, turns=4)
    wait = calls if small else replace(calls, size=(32, 1), P=4, length=20)
    train = replace(step, prompt=64) if small else replace(step, P=4, prompt=512)
    wide = replace(step, vocabulary=3000) if small else Work((64, 1), P=2, length=32, vocabulary=151_669)
    large = {} if mode != 'full' else {
        'step 64+64, 3.67M': lambda: step_case('step 64+64, 3.67M', replace(step, size='3.67M'), n(7), 2., 2.4),
        'step 4 turns with tools, 3.67M': lambda: step_case('step 4 turns with tools, 3.67M', replace(calls, size='3.67M'), n(3), 2.7, 3.2),
        'training 512+64, group 8, 3.67M': lambda: training_case('training 512+64, group 8, 3.67M', replace(train, size='3.67M'), n(7)),
        'rollout 4 turns, 3.67M': lambda: rollout_case('rollout 4 turns, 3.67M', replace(calls, size='3.67M'), n(3)),
        'memory, step 64+64, 3.67M': lambda: memory_case('memory, step 64+64, 3.67M', replace(step, size='3.67M'), 1)}
    some = lambda *xs: xs if mode == 'full' else xs[:2]
    base = replace(step, P=2, G=4) if small else replace(step, P=4, length=32)
    grow = {'group size': {g: replace(base, G=g) for g in some(*((2, 4) if small else (4, 16, 8, 32)))}, 'prompt length': {t: replace(base, prompt=t) for t in some(*((24, 48) if small else (64, 512, 256, 1024)))},
            'turns': {k: replace(calls, P=base.P, G=base.G, turns=k, length=calls.length if small else 33) for k in some(*((2, 3) if small else (2, 6, 4, 8)))}, 'conversations': {P * base.G: replace(base, P=P) for P in some(*((2, 4) if small else (2, 8, 4, 16)))}}
    return {
        'step 64+64, 0.66M': lambda: step_case('step 64+64, 0.66M', step, n(11), 2.9, 3.4),
        'step realistic lengths, 0.66M': lambda: step_case('step realistic lengths, 0.66M', real, n(16), 10., 12.6),
        'step 4 turns with tools, 0.66M': lambda: step_case('step 4 turns with tools, 0.66M', calls, n(5), 3.2, 3.8),
        'async tools, the waiting': lambda: waiting_case('async tools, the waiting', wait, n(7)),
        'training 512+64, group 8, 0.66M': lambda: training_case('training 512+64, group 8, 0.66M', train, n(11)),
        'rollout 4 turns, 0.66M': lambda: rollout_case('rollout 4 turns, 0.66M', calls, n(5)),
        'step 64+32, 151,669 tokens': lambda: step_case('step 64+32, 151,669 tokens', wide, n(5), None),
        **large,
        'memory, step 64+64, 0.66M': lambda: memory_case('memory, step 64+64, 0.66M', step, 1),
        'memory, 4 turns with tools, 0.66M': lambda: memory_case('memory, 4 turns with tools, 0.66M', calls, 1),
        'memory, 64+32, 151,669 tokens': lambda: memory_case('memory, 64+32, 151,669 tokens', wide, 1),
        **{f'growth: {k}': lambda k=k, ws=ws: growth_case(f'growth: {k}', dict(sorted(ws.items())), n(5)) for k, ws in grow.items()}}

def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in [head, ['---'] * len(head), *rows])

def number(x: float | None) -> str: return '-' if x is None else f'{x:.3g}' if x < 100 else f'{x:.0f}'

def reading(r: dict) -> str:
    "One case in words made from its figures."
    if r['ratio'] is None:
        e = r['exponents']
        word = 'less than in proportion' if e['seconds'] < .95 else 'in proportion' if e['seconds'] <= 1.05 else 'more than in proportion'
        return f'**{r["case"]}**: time grows {word} to the unique tokens (exponent {e["seconds"]}; play {e["play"]}, learn {e["learn"]}, memory {e["memory"]}), from {r["points"][0]["at"]} to {r["points"][-1]["at"]}.'
    end = '' if r['goal'] is None else f' The goal of {r["goal"]:g}x is met.' if r['met'] else f' It falls short of the goal of {r["goal"]:g}x.'
    if r.get('bare') and r['peer']: end += f' A bare loop without a framework is {r["peer"] / r["bare"]:.2f}x as fast as the other side here, so that is about what can be had' + (f' (we are at {100 * r["bare"] / r["ours"]:.0f} % of its speed).' if r['bare'] < r['ours'] else '; we are faster.')
    if 'ours_play' in r: end += f' Of our round {1000 * r["ours_play"]["median"]:.0f} ms are play and {1000 * r["ours_learn"]["median"]:.0f} ms learning.'
    if 'did' in r: end += ' Tokens an answer: ' + ', '.join(f'{k} {v["tokens an answer"]:g}' for k, v in r['did'].items()) + '; groups that agree: ' + ', '.join(f'{k} {100 * v["groups that agree"]:.0f} %' for k, v in r['did'].items()) + '.'
    if 'cpu_ratio' in r: end += f' In CPU seconds the ratio is {r["cpu_ratio"]}.'
    if 'same_update' in r: end += f" Fed our episodes, TRL's gradient is {r['same_update']:.0e} from ours (relative, by norm)."
    if 'gradient_error' in r: end += f' The gradient is {r["gradient_error"]:.0e} from theirs; from that of float64 ours is {r["gradient_error_to_float64"]["ours"]:.0e} and theirs {r["gradient_error_to_float64"]["peer"]:.0e}.'
    if 'least' in r: end += f' All at once they need {r["least"]:g} s. The whole round with them takes {r["round_ratio"]}x as long there as here; it is {r["longer"]["ours"]} s and {r["longer"]["peer"]} s longer than without waiting (difference of medians).'
    return f'**{r["case"]}**: {number(r["ours"])} against {number(r["peer"])} {r["unit"]}, {r["ratio"]:.2f}x.{end}'

def against(case: str) -> str:
    return {'training': 'one padded row each', 'rollout': '`generate`', 'growth': '-'}.get(case.split()[0].strip(':,'), 'TRL')

def markdown(records: Sequence[dict], mode: str) -> str:
    "The results as a page."
    small = {'quick': 'Few repeats of the small model', 'smoke': 'Tiny settings that only show that the bench runs'}.get(mode)
    def times(r, who): return '-' if who not in r or r[who] is None else number(r[who]) + (f' ({number(r["spread"][who]["q1"])} to {number(r["spread"][who]["q3"])}, least {number(r["spread"][who]["min"])})' if who in r['spread'] else '')
    rows = [[r['case'], against(r['case']), times(r, 'ours'), times(r, 'peer'), times(r, 'bare'), r['unit'], f'{r["ratio"]:.2f}', number(r['goal']), number(r['aim']) if r.get('aim') else '-', {True: 'met', False: '**NOT met**', None: ''}[r['met']]]
            for r in records if r['ratio'] is not None]
    curves = [[r['case'], *(r['exponents'][k] for k in ('seconds', 'play', 'learn', 'memory')), '; '.join(f'{p["at"]}: {number(p["seconds"]["median"])} s, {p["peak_mb"] - p["base_mb"]:.0f} MB' for p in r['points'])] for r in records if r['ratio'] is None]
    loads = [r['machine']['load'] for r in records]
    made = sorted({f'{r["machine"]["date"]}: {r["machine"]["cpu"]}, {r["machine"]["cores"]} cores, {r["machine"]["threads"]} thread{"s" * (r["machine"]["threads"] > 1)}, load at the end of a case {min(loads)} to {max(loads)}; ' + ', '.join(f'{k} {v}' for k, v in r['versions'].items()) for r in records})
    return '\n\n'.join(['# The engine beside TRL', *([f'*{small}: these are not the figures of the full bench.*'] if small else []),
        'Medians of rounds taken in turn (quartiles, least). *Bare* is the same round as plain code over the same model, with no framework: prompts read once, flat keys and values, a shared prefix in training. '
        '*Aim* is what such a loop once reached against TRL on another machine.', '![Ratios with goals, and growth](engine.png)',
        table(['case', 'against', 'ours', 'theirs', 'bare', 'unit', 'ratio', 'goal', 'aim', ''], rows), '## What they say', '\n'.join(f'- {reading(r)}' for r in records),
        *(['## Growth', 'Exponents of CPU seconds, of playing, of learning (wall) and of peak memory above the imports, in tokens a round really has; a process for each point.', table(['case', 'time', 'play', 'learn', 'memory', 'points'], curves)] if curves else []),
        '## How the sides were made equal', '\n'.join(__doc__.split('How the work is made equal. ')[1].strip().splitlines()), '## Made with', '\n'.join(f'- {m}' for m in made), 'Made by `benchmarks/engine.py`.']) + '\n'

def plot(records: Sequence[dict], path: Path) -> None:
    "The ratio of each case with its goal; growth of time and memory."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    bars, curves = [r for r in records if r['ratio'] is not None], [r for r in records if r['ratio'] is None]
    fig = Figure(figsize=(13, 2 + .32 * max(len(bars), 8)), layout='constrained', dpi=110)
    FigureCanvasAgg(fig)
    left, time_, memory = fig.subplots(1, 3, width_ratios=(2.2, 1, 1))
    for y, r in enumerate(bars):
        left.barh(y, r['ratio'], color='#4a7fb0' if r['met'] is not False else '#c77f4a', height=.6)
        if 'ratio' in r['spread']: left.plot([r['spread']['ratio']['q1'], r['spread']['ratio']['q3']], [y, y], color='#222', lw=1)
        for v, mark in ((r['goal'], '|'), (r['peer'] / r['bare'] if r.get('bare') else None, 'x')):
            if v: left.plot(v, y, mark, color='#111', ms=14 if mark == '|' else 6, mew=2)
    left.set(yticks=range(len(bars)), yticklabels=[r['case'] for r in bars], xscale='log', xlabel='theirs / ours (times); | goal, x bare loop, line quartiles')
    left.invert_yaxis(); left.axvline(1, color='#999', lw=.8)
    for r in curves:
        x = [p['unique_tokens'] for p in r['points']]
        for ax, y, k in ((time_, [p['cpu']['median'] for p in r['points']], 'seconds'), (memory, [p['peak_mb'] - p['base_mb'] for p in r['points']], 'memory')):
            ax.loglog(x, y, 'o-', ms=4, label=f'{r["case"].removeprefix("growth: ")} ({r["exponents"][k]:.2f})')
    for ax, what in ((time_, 'CPU time of a round (s)'), (memory, 'peak memory above imports (MB)')):
        ax.set(xlabel='unique tokens of a round', ylabel=what)
        if curves: ax.legend(frameon=False, fontsize=8, title='growing (exponent)', title_fontsize=8)
    tmp = path.with_suffix('.part.png')
    fig.savefig(tmp, metadata={'Software': None})
    tmp.replace(path)

def write(records: Sequence[dict], mode: str, folder: Path) -> list[dict]:
    "JSON, page and picture, with the results of other cases that stand there."
    folder.mkdir(parents=True, exist_ok=True)
    f, now = folder / 'engine.json', {r['case']: r for r in records}
    old = json.loads(f.read_text()) if f.is_file() else []
    order = list(cases(mode))
    both = {r['case']: r for r in old if r['mode'] == mode} | now
    res = sorted(both.values(), key=lambda r: (r['machine']['threads'], next((i for i, k in enumerate(order) if r['case'].startswith(k)), len(order))))
    plot(res, folder / 'engine.png')
    write_text(folder / 'engine.md', markdown(res, mode))
    write_text(f, json.dumps(res, indent=1))
    return res

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='few repeats, the small model')
    p.add_argument('--smoke', action='store_true', help='tiny settings')
    p.add_argument('--case', action='append', default=[], help='only cases whose name begins so; may be given several times')
    p.add_argument('--repeats', type=int, help='rounds that are counted, instead of those the case has')
    p.add_argument('--threads', type=int, default=1, help="torch's threads")
    p.add_argument('--results', type=Path, help='folder of the results')
    p.add_argument('--point', help=argparse.SUPPRESS)
    a = p.parse_args()
    try: import datasets, trl  # noqa: F401
    except ImportError as e: sys.exit(f'{e.name} is not here: `pip install -c constraints.txt trl` for the other side of this bench')
    os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
    torch.set_num_threads(json.loads(a.point)['threads'] if a.point else a.threads)
    if a.point: return print(json.dumps(point(json.loads(a.point))))
    mode = 'smoke' if a.smoke else 'quick' if a.quick else 'full'
    every = cases(mode, a.repeats)
    wanted = [k for k in every if not a.case or any(k.startswith(c) for c in a.case)]
    if not wanted: p.error(f'--case {", ".join(a.case)} — expected the beginning of one of: {"; ".join(every)}')
    folder = a.results or HERE / 'results' / ('' if mode == 'full' else 'tmp')
    for k in wanted:
        r = every[k]() | {'mode': mode}
        if a.threads > 1: r['case'] += f', {a.threads} threads'
        write([r], mode, folder)
        print(reading(r), flush=True)
    print(f'\n{folder}/engine.json, .md, .png')

if __name__ == '__main__': main()
