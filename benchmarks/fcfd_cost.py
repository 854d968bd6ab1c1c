"""What FCFD costs: its steps as a multiple of SoftTarget's, in time and in floating-point operations, and each mixed
path by itself.

python benchmarks/fcfd_cost.py --cpu --write benchmarks/fcfd_cost.md"""
import copy
import gc
import itertools
import os
import statistics
import sys
import time

import torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
from speed import (Batches,cases,learner,networks,prepare,ratio,say,stages,table,there_and_back,where)
from torch.utils.flop_counter import FlopCounterMode

from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.networks.net import Net

# -- what is measured

candidates = [(d,i) for d in ('s2t','t2s') for i in range(len(stages)-1)]

def word(d, i):
    "A path, a letter for each part of the networks: up to the end of the first stage, of the others, and the head"
    a,b = d.split('2')
    return ' '.join([a]*(i+1)+['|']+[b]*(len(stages)-i))

def drawing(draws):
    "FCFD that takes these draws in turn, so that the mean of an epoch is that of all draws"
    fcfd,turn = FCFD(paths=len(draws[0])),itertools.cycle(draws)
    fcfd.draw = lambda: next(turn)
    return fcfd

pairs = list(itertools.combinations(candidates, 2))
def one_path(candidate): return lambda: drawing([[candidate]])

ways = {
    'SoftTarget()': SoftTarget, 'FCFD(paths=0)': lambda: FCFD(paths=0),
    **{word(*c): one_path(c) for c in candidates}, 'FCFD()': lambda: drawing(pairs)}

# -- how
class Count(Callback):
    "Floating-point operations of one step, forward and backward: those of the second batch, as the first one opens"
    order = 90
    def before_batch(self): self.counter = FlopCounterMode(display=False).__enter__()
    def after_backward(self):
        self.counter.__exit__(None, None, None)
        self.flops = self.counter.get_total_flops()

def flops(f):
    with torch.no_grad(), FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


def made(student, teacher, dl, loss, cbs=()):
    kd = KnowledgeDistillationCallback(copy.deepcopy(teacher), TaskLoss()+loss)
    return learner(dl, copy.deepcopy(student), [kd,*cbs])

def suffixes(student, teacher, x):
    "Forward operations of both networks, and of what each path runs after its switch"
    nets = dict(s=Net(student, x, stages), t=Net(teacher, x, stages))
    full = {k: flops(lambda: n(x)) for k,n in nets.items()}
    with torch.no_grad(): maps = {k: n(x).fm for k,n in nets.items()}
    res = {}
    for d,i in candidates:
        k,layer = d[-1],stages[i]
        nets[k].can_resume(layer)                        # tries the cut, which takes passes that are not to be counted
        res[d,i] = flops(lambda: nets[k].resume(layer, maps[k][layer]))
    return full,res

class Each(Count):
    "Of every step"
    def __init__(self): self.got = []
    def after_backward(self):
        super().after_backward()
        self.got.append(self.flops)

def count(student, teacher, data, device):
    "Operations of a step of each way; of FCFD() the mean over its draws"
    res = {}
    for name,loss in ways.items():
        each,steps = Each(),len(pairs) if name=='FCFD()' else 1
        made(student, teacher, Batches(data, steps, 1, device, time.perf_counter), loss(), [each])()
        res[name] = statistics.mean(each.got[1:])
    return res

def measure(student, teacher, data, steps, rounds, warm, device, clock, progress):
    "Times of `rounds` interleaved epochs of every way, in ms a step"
    n = {name: steps if name=='FCFD()' else max(steps//3, 2) for name in ways}
    dls = {name: Batches(data, n[name], warm, device, clock) for name in ways}
    runs = {name: made(student, teacher, dls[name], loss()) for name,loss in ways.items()}
    times = {name: [] for name in ways}
    for r in range(rounds+1):                            # the first round is not counted
        for name in there_and_back(ways, r):
            gc.collect()
            dls[name].restart()
            runs[name]()
            _,b,c = dls[name].stamps
            if r: times[name].append((c-b)/n[name]*1e3)
            say(progress, f'\r  round {r} of {rounds}, {name:14}')
    say(progress, '\r'+' '*40+'\r')
    return times

# -- what is written

soft,base = 'SoftTarget()','FCFD(paths=0)'
whole_head = 'step','ms','time / SoftTarget','GFLOP','GFLOP / SoftTarget'
paths_head = ('path','its suffix is of the','suffix, GFLOP','of the student\'s forward','of the teacher\'s forward',
              'extra expected from FLOPs','extra in time')

def whole_steps(ops, times):
    def row(w):
        ms = f'{statistics.median(times[w]):.1f}'
        return w,ms,ratio(times[w], times[soft]),f'{ops[w]/1e9:.3g}',f'{ops[w]/ops[soft]:.3f}'
    return [row(w) for w in (soft,base,'FCFD()')]

def paths(full, suffix, ops, times):
    "A row a path (its bar is escaped, in a table of Markdown), and one for two of them"
    def extra(w): return ratio([a-b for a,b in zip(times[w], times[base], strict=True)], times[soft])
    def row(c):
        w,of = word(*c),dict(s='student', t='teacher')[c[0][-1]]
        return (w.replace('|', '\\|'), of, f'{suffix[c]/1e9:.3g}', f"{suffix[c]/full['s']:.2f}",
                f"{suffix[c]/full['t']:.2f}", f'{(ops[w]-ops[base])/ops[soft]:.3f}', extra(w))
    two = 2*statistics.mean(ops[word(*c)]-ops[base] for c in candidates)/ops[soft]
    return [*map(row, candidates), ('two of four, the mean', '', '', '', '', f'{two:.3f}', extra('FCFD()'))]

def report(name, full, suffix, ops, times):
    "Two tables of a case: whole steps, and the paths one by one"
    forward = f"Forward: student {full['s']/1e9:.3g} GFLOP, teacher {full['t']/1e9:.3g} GFLOP a batch."
    return '\n\n'.join([f'## {name}', forward, table(whole_head, whole_steps(ops, times)),
                        table(paths_head, paths(full, suffix, ops, times))])

legend = """Both losses stand beside `TaskLoss()` in the same Learner and callback. *FCFD(paths=0)* has the bridges \
and compares the maps, without a mixed path; *FCFD()* takes the six possible draws of two paths in turn.
A path is a word over the student `s` and the teacher `t`, a letter for each part: up to the end of stage 1, stage 2, \
stage 3, and the head.
*suffix*: forward operations after the switch, by `torch.utils.flop_counter` (convolutions and matrix products; a \
multiplication and its addition are two). Columns *GFLOP* count a step's forward and backward passes.
*extra*: what a path adds to *FCFD(paths=0)*, as a part of a SoftTarget step; that from FLOPs holds its suffix forward \
and backward, and the bridge from teacher to student where it needs one.
Times: median over rounds of ratios of epochs close in time, the middle half in brackets."""

@call_parse
def main(
    case:str='',       # Only cases whose name holds this
    rounds:int=5,      # Epochs of each way, timed
    steps:int=6,       # Steps of FCFD() a timed epoch, a multiple of 6 (ten times as many if short); of others a third
    warm:int=1,        # Batches before each timed epoch
    device:str='',     # cpu, cuda, …; the default is a GPU where there is one
    threads:int=1,     # Threads of torch's operations on the CPU; 0: its own choice
    cpu:bool=False,    # Count the processor's time, not that of the clock: for a busy machine, without a GPU
    write:str='',      # Markdown file for the tables
    quiet:bool=False,  # No count of rounds
):
    "Print the cost of a step of FCFD as a multiple of SoftTarget's, beside the operations its mixed paths take"
    if rounds<2: sys.exit('--rounds: at least 2, the spread is shown too')
    if steps%len(pairs):
        sys.exit(f'--steps {steps}: expected a multiple of {len(pairs)}, so that all draws come equally often')
    device,clock = prepare(device, threads, cpu)
    before,parts = os.getloadavg(),[]
    for name,spec in cases.items():
        if case not in name: continue
        student,teacher,data = networks(spec, device, 4)
        full,suffix = suffixes(student, teacher, data[0][0])
        ops = count(student, teacher, data, device)
        n = steps*(10 if spec.bs<16 else 1)
        times = measure(student, teacher, data, n, rounds, warm, device, clock, not quiet)
        parts.append(report(name, full, suffix, ops, times))
        print(parts[-1]+'\n', flush=True)
    machine = where('fcfd_cost.py', device, cpu, before)
    print(machine)
    if write:
        with open(write, 'w', encoding='utf-8') as f:
            f.write('Written by `fcfd_cost.py`.\n\n'+'\n\n'.join([*parts,legend,machine])+'\n')
