"""What the callback costs: the same steps taken by a bare PyTorch loop, by a fastai Learner with a callback written by
hand, and by a Learner with ours.

python benchmarks/speed.py --write benchmarks/speed.md"""
import copy
import gc
import os
import platform
import statistics
import sys
import time
from collections import namedtuple

import fastai
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastcore.script import call_parse
from models import resnet20,resnet56
from torch import nn

from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.logits import SoftTarget

# -- what is measured: to add a loss, say it our way and by hand

Case = namedtuple('Case', 'student teacher bs size batches rounds')
Method = namedtuple('Method', 'loss by_hand layers')   # by_hand(task, pred, teacher_pred, maps, teacher_maps)

cases = {
    'resnet56 → resnet20, 128×3×32×32': Case(resnet20, resnet56, 128, 32, 6, 9),
    'dispatch: resnet56 → resnet20, 2×3×8×8': Case(resnet20, resnet56, 2, 8, 60, 25),
}

def soft(s, t, T=4.):
    log_s,log_t = F.log_softmax(s/T, 1),F.log_softmax(t/T, 1)
    return F.kl_div(log_s, log_t, reduction='batchmean', log_target=True)*T**2
def at(z): return F.normalize(z.pow(2).sum(1).flatten(1), dim=1, eps=1e-12)
def attention(ss, ts): return sum((at(s)-at(t)).pow(2).mean() for s,t in zip(ss, ts, strict=True))

stages = 'layer1','layer2','layer3'
methods = {
    'none: the student alone': None,
    'SoftTarget': Method(
        lambda: SoftTarget(T=4), lambda task,p,tp,ss,ts: task.lerp(soft(p, tp), .5), ()),
    'SoftTarget + Attention': Method(
        lambda: .1*TaskLoss() + .9*SoftTarget(T=4) + 1000*Attention(),
        lambda task,p,tp,ss,ts: task*.1 + soft(p, tp)*.9 + attention(ss, ts)*1000, stages),
}
lr,sgd = .05,dict(momentum=.9, weight_decay=5e-4)

# -- how
class Batches:
    """A loader of prepared batches: a short pass to warm up, then the timed one, then an empty one;
    `stamps` says when each began"""
    def __init__(self, batches, n, warm, device, clock):
        self.batches,self.sizes,self.device,self.clock = batches,(warm,n,0),device,clock
        self.restart()
    def restart(self):
        self.at,self.stamps = 0,[]
        return self
    def __len__(self): return self.sizes[min(self.at, 2)]
    def __iter__(self):
        n,start = len(self),sum(self.sizes[:self.at])
        self.at += 1
        if self.device.type=='cuda': torch.cuda.synchronize()
        self.stamps.append(self.clock())
        for i in range(n): yield self.batches[(start+i)%len(self.batches)]

class ByHand(Callback):
    "Distillation as one writes it for one loss: hooks that keep what the layers return, the teacher, the sum"
    order,run_valid = 5,False
    def __init__(self, teacher, f, layers):
        self.teacher,self.f,self.layers,self.ss,self.ts = teacher,f,layers,[],[]
    def before_fit(self):
        self.teacher.eval().requires_grad_(False)
        self.handles = [*self.keep(self.learn.model, self.ss),*self.keep(self.teacher, self.ts)]
    def keep(self, model, to):
        for n in self.layers: yield model.get_submodule(n).register_forward_hook(lambda m,i,o: to.append(o))
    def after_loss(self):
        with torch.no_grad(): teacher_pred = self.teacher(*self.learn.xb)
        self.learn.loss_grad = self.f(self.learn.loss_grad, self.learn.pred, teacher_pred, self.ss, self.ts)
    def after_batch(self):
        self.ss.clear()
        self.ts.clear()
    def after_fit(self):
        for h in self.handles: h.remove()

def bare(dl, student, teacher, m):
    "The loop in plain PyTorch, as a function that goes through the three passes"
    opt,crit = torch.optim.SGD(student.parameters(), lr=lr, **sgd),nn.CrossEntropyLoss()
    def alone(x, y): return crit(student(x), y)
    def of_logits(x, y):
        pred = student(x)
        with torch.no_grad(): teacher_pred = teacher(x)
        return m.by_hand(crit(pred, y), pred, teacher_pred, None, None)
    def of_maps(x, y):
        pred,ss = student(x, maps=True)
        with torch.no_grad(): teacher_pred,ts = teacher(x, maps=True)
        return m.by_hand(crit(pred, y), pred, teacher_pred, ss, ts)
    loss = alone
    if m: loss = of_maps if m.layers else of_logits
    def step(x, y):
        loss(x, y).backward()
        opt.step()
        opt.zero_grad()
    def run():
        student.train()
        if teacher is not None: teacher.eval().requires_grad_(False)
        for _ in dl.sizes:
            for x,y in dl: step(x.to(dl.device), y.to(dl.device))
    return run

def learner(dl, student, cbs, lr=lr):
    """The same with a Learner that has fastai's default callbacks (Recorder too), without the progress bar,
    and whose validation set is empty"""
    def opt_func(params, lr): return OptimWrapper(params, torch.optim.SGD, lr=lr, **sgd)
    learn = Learner(DataLoaders(dl, []), student, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, cbs=cbs)
    def run():
        with learn.no_bar(), learn.no_logging(): learn.fit(len(dl.sizes), lr)
    return run

def difference(a, b):
    "The largest difference between the states of two networks"
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return torch.stack([(x.double()-y.double()).abs().max() for x,y in pairs]).max().item()

def networks(case, device, n):
    "Student, teacher with averages that fit the data, and `n` batches of data"
    torch.manual_seed(0)
    student,teacher = case.student().to(device),case.teacher().to(device)
    def batch():
        x = torch.randn(case.bs, 3, case.size, case.size, device=device)
        return x,torch.randint(100, (case.bs,), device=device)
    data = [batch() for _ in range(n)]
    with torch.no_grad():
        for x,_ in data: teacher(x)
    return student,teacher,data

def made(way, m, student, teacher, dl):
    "A way to take the steps: a function that takes them with copies of the networks, and the student's copy"
    student,teacher = copy.deepcopy(student),copy.deepcopy(teacher) if m else None
    if way=='bare': return bare(dl, student, teacher, m),student
    cbs = []
    if m and way=='ours': cbs = [KnowledgeDistillationCallback(teacher, m.loss())]
    if m and way=='hand': cbs = [ByHand(teacher, m.by_hand, m.layers)]
    return learner(dl, student, cbs),student

def there_and_back(names, r): return list(names)[::1 if r%2 else -1]

def say(progress, text):
    "A line that the next one is written over"
    if progress: print(text, end='', file=sys.stderr, flush=True)

def measure(case, m, batches, rounds, warm, device, clock, progress):
    """Times of `rounds` interleaved epochs of each way to take the same steps, in ms a step,
    and how far apart their students are"""
    student,teacher,data = networks(case, device, min(batches, 8))
    names = ['bare','ours','hand'] if m else ['bare','ours']
    dls = {w: Batches(data, batches, warm, device, clock) for w in names}
    ways = {w: made(w, m, student, teacher, dls[w]) for w in names}
    times,first = {w: [] for w in names},{w: [] for w in names}
    for r in range(rounds+1):                            # the first round is not counted
        for w in there_and_back(names, r):
            gc.collect()
            dls[w].restart()
            ways[w][0]()
            a,b,c = dls[w].stamps
            if r:
                times[w].append((c-b)/batches*1e3)
                first[w].append((b-a)*1e3)
        apart,steps = max(difference(ways['bare'][1], s) for _,s in ways.values()),(r+1)*(warm+batches)
        if not apart<=1e-6:
            sys.exit(f'after {steps} steps the students differ by {apart:.2e}: these are not the same steps')
        say(progress, f'\r  round {r} of {rounds}')
    say(progress, '\r')
    return times,first,apart,steps

def ratio(a, b):
    "Median of the ratios of neighbours in time, and the middle half of them"
    q1,q2,q3 = statistics.quantiles([x/y for x,y in zip(a, b, strict=True)], n=4, method='inclusive')
    return f'{q2:.3f} ({q1:.3f}–{q3:.3f})'

head = ('case','loss','bare loop, ms/step','Learner + callback, ms/step','callback / bare loop',
        'callback / callback by hand','by hand / bare loop','opening, ms','steps','largest difference')

def row(name, loss, times, first, apart, steps):
    bare,ours,hand = (times.get(w) for w in ('bare','ours','hand'))
    of_hand = ['–']*3
    if hand:
        opening = statistics.median(a-b for a,b in zip(first['ours'], first['hand']))
        of_hand = [ratio(ours, hand),ratio(hand, bare),f'{opening:.0f}']
    return (name, loss, f'{statistics.median(bare):.2f}', f'{statistics.median(ours):.2f}', ratio(ours, bare), *of_hand,
            str(steps), f'{apart:.1e}')

def table(head, rows): return '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---']*len(head), *rows])

legend = """*callback* is `KnowledgeDistillationCallback`, *callback by hand* a dozen lines written for that one loss \
in the same Learner: their ratio is what our machinery costs.
The Learner has fastai's default callbacks, the Recorder among them, and no progress bar; its validation set is \
empty. *none* is a Learner without distillation, so its ratio is what fastai itself costs.
A timed epoch ends after what fastai and we do at its end; *opening* is what the callback does once a fit, on its \
first batch. Ratios: median over rounds of epochs that follow each other, the middle half in brackets.
*steps* is how many steps of SGD each way took in all, *largest difference* how far apart parameters and statistics of \
their students are afterwards."""

# -- where, for this file and its sisters

def prepare(device, threads, cpu):
    "The device and the clock that are asked for"
    if threads: torch.set_num_threads(threads)
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if cpu and device.type!='cpu':
        sys.exit("--cpu counts the time of this machine's processor alone: with it go --device cpu")
    return device,time.process_time if cpu else time.perf_counter

def where(script, device, cpu, before):
    "The machine and the versions, in a line; `before` is its load then"
    chip = f'{platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}'
    if device.type=='cuda': chip = torch.cuda.get_device_name(device)
    def load(o): return ', '.join(f'{x:.1f}' for x in o)
    return (f'{device.type} ({chip}); torch {torch.__version__}, fastai {fastai.__version__}, '
            f'Python {platform.python_version()}; times of {"the processor" if cpu else "the clock"}; '
            f'load averages before {load(before)}, after {load(os.getloadavg())}; '
            f'`{" ".join([script,*sys.argv[1:]])}`')

@call_parse
def main(
    case:str='',       # Only cases whose name holds this
    loss:str='',       # Only losses whose name holds this
    rounds:int=0,      # Epochs of each way, timed; 0: as many as the case says
    batches:int=0,     # Batches an epoch; 0: as many as the case says
    warm:int=2,        # Batches before each timed epoch
    device:str='',     # cpu, cuda, …; the default is a GPU where there is one
    threads:int=1,     # Threads of torch on the CPU (on a busy machine several wait for each other); 0: its own choice
    cpu:bool=False,    # Count the processor's time, not that of the clock: for a busy machine, without a GPU
    write:str='',      # Markdown file for the table
    quiet:bool=False,  # No count of rounds
):
    "Time the same steps by a bare PyTorch loop and by a Learner with our callback; fails if they are not the same"
    device,clock = prepare(device, threads, cpu)
    if device.type=='cuda': torch.backends.cudnn.deterministic = True
    before,rows = os.getloadavg(),[]
    asked = [(c,l) for c in cases for l in methods if case in c and loss in l]
    for c,l in asked:
        spec = cases[c]
        res = measure(spec, methods[l], batches or spec.batches, rounds or spec.rounds, warm, device, clock, not quiet)
        rows.append(row(c, l, *res))
        text = table(head, rows[-1:])
        print(text if len(rows)==1 else text.splitlines()[-1], flush=True)
    machine = where('speed.py', device, cpu, before)
    print('\n'+machine)
    if write:
        with open(write, 'w', encoding='utf-8') as f:
            f.write(f'Written by `speed.py`.\n\n{table(head, rows)}\n\n{legend}\n\n{machine}\n')
