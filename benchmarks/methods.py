"""Every method on the demo's digits: what the student comes to, what a step costs, and what it was tried on.

python benchmarks/methods.py"""
import copy
import gc
import json
import os
import statistics
import sys
import time
from collections import OrderedDict
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from fastai.callback.mixup import MixUp
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from recipes import part,recipe,recipes
from speed import Batches,cases,learner,networks,there_and_back,where
from torch import nn

from fasterdistill import losses
from fasterdistill.all import KnowledgeDistillationCallback,TaskLoss,predictions,simkd_student
from fasterdistill.demo import digit_learner,digits,fit,jitter,n_params,tensor_dls
from fasterdistill.examples import CNN,UNet,ViT
from fasterdistill.losses.sskd import fit_head,projection_head

here = Path(__file__).parent
prepared = dict(SimKD=simkd_student)     # makes another student of both, taught by the teacher alone

def callback(teacher, name, epochs, **makes):
    "Distillation by the recipe `name`; the student alone where there is none"
    if name=='alone': return None
    loss = recipe(name, epochs, **makes)
    asked = loss.reads.keys() & {'teacher_pred','fm_t','teacher'}
    return KnowledgeDistillationCallback(teacher if asked else None, loss, weight=1. if name in prepared else .5)

# -- what it comes to
budget = dict(epochs=20, teacher_epochs=20, lr=5e-3)

class Three(nn.Sequential):
    "Three stages of two convolutions, each of half the size and twice the width: `(B,1,28,28)` to `(B,10)`"
    def __init__(self, w):
        stages = [(f'layer{i+1}', nn.Sequential(ConvLayer(a, b, stride=2), ConvLayer(b, b)))
                  for i,(a,b) in enumerate(pairwise((1,w,2*w,4*w)))]
        head = ('pool',nn.AdaptiveAvgPool2d(1)),('flat',nn.Flatten()),('fc',nn.Linear(4*w, 10))
        super().__init__(OrderedDict([*stages,*head]))

@cache
def images(): return digits()
@cache
def teacher():
    "A wide CNN, trained on images that are turned, scaled and shifted"
    return fit(digit_learner(lambda: Three(24), *images(), tfm=jitter), budget['teacher_epochs'], budget['lr']).model

@cache
def head():
    "What SSKD needs of the teacher, by as many epochs as its authors take of 240"
    return fit_head(teacher(), tensor_dls(*images()), epochs=part(budget['epochs'], 60), progress=False)
@cache
def answers():
    "What the teacher says of the images tested on"
    return predictions(teacher(), images()[1][0]).argmax(1)

def share(model, of): return (predictions(model, images()[1][0]).argmax(1)==of).float().mean().item()

def trained(name, seed):
    "A student of three stages after the same few epochs, as numbers"
    set_seed(seed+1, True)                               # a peer begins elsewhere than the student
    kd = callback(teacher(), name, budget['epochs'], peer=lambda: Three(4), head=head)
    def student():
        net = Three(4)
        return prepared[name](net, teacher(), images()[0][0][:4]) if name in prepared else net
    learn = digit_learner(student, *images(), seed=seed, cbs=kd)
    start = time.process_time()
    model = fit(learn, budget['epochs'], budget['lr']).model
    seconds = (time.process_time()-start)/budget['epochs']
    beside = n_params(kd.loss) if kd else 0
    return dict(accuracy=share(model, images()[1][1]), agreement=share(model, answers()), seconds=seconds,
                parameters=n_params(model), beside=beside)

# -- what a step costs
pair,(batches,rounds,warm) = cases['resnet56 → resnet20, 128×3×32×32']._replace(bs=32),(4,7,2)

class Numbered(Batches):
    "Batches whose items have numbers, for a loss that remembers each"
    bs = pair.bs
    @property
    def dataset(self): return range(self.bs*len(self.batches))
    def get_idxs(self): return [i%len(self.dataset) for i in range(self.bs*len(self))]
    def __iter__(self):
        self.get_idxs()                                  # as fastai's loaders do when they begin
        return super().__iter__()

def cost(name):
    "Processor time of a step, as a multiple of that of SoftTarget in the same round: median, and the middle half"
    device = torch.device('cpu')
    student,teacher,data = networks(pair, device, batches)
    ways,times = {},{}
    for n in (name,'SoftTarget'):
        dl = Numbered(data, batches, warm, device, time.process_time)
        own,other = copy.deepcopy(student),copy.deepcopy(teacher)
        if n in prepared: own = prepared[n](own, other, data[0][0])
        kd = callback(other, n, 240, peer=pair.student, head=lambda: projection_head(64))
        ways[n],times[n] = (dl,learner(dl, own, [kd], lr=1e-7)),[]       # noise, which some weights diverge on
        if n==name=='SoftTarget': return [1.,1.,1.]
    for r in range(rounds+1):
        for n in there_and_back(ways, r):
            dl,run = ways[n]
            gc.collect()
            dl.restart()
            run()
            if r: times[n].append(dl.stamps[2]-dl.stamps[1])
    ratios = [a/b for a,b in zip(times[name], times['SoftTarget'], strict=True)]
    return statistics.quantiles(ratios, n=4, method='inclusive')

# -- what it was tried on
def said(e):
    "The first line of an error, without where fastai says that it occurred"
    return str(e).split('`before_batch`:\n\t')[-1].split('\n')[0]

def one_fit(name, student, teacher, y, size=8, ni=1, cbs=()):
    "None where a short fit goes through, else why not"
    torch.manual_seed(0)
    x = torch.rand(16, ni, size, size)
    dls = tensor_dls((x,y), (x,y), bs=8)
    try:
        if name in prepared: student = prepared[name](student, teacher, x[:4])
        loss = getattr(losses, name).example(student, x[:4])
        whole = loss if name in prepared else TaskLoss()+loss
        kd = KnowledgeDistillationCallback(teacher, whole, weight=1. if name in prepared else .5)
        learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(axis=1 if y.ndim>1 else -1), cbs=[kd,*cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    except (TypeError,ValueError,RuntimeError) as e: return said(e)

def tried(name):
    "What came of a short fit: of other networks, of one answer a pixel, of mixed pictures"
    torch.manual_seed(0)
    y,pixels = torch.arange(16)%10,torch.randint(4, (16,8,8))
    return {'CNN from ViT': one_fit(name, CNN(8), ViT(), y),
            'ViT from CNN': one_fit(name, ViT(), CNN(8), y),
            'pixels': one_fit(name, UNet(), UNet(), pixels, 16, 3),
            'MixUp': one_fit(name, CNN(8), CNN(8), y, cbs=[MixUp()])}

def written(name):
    "The recipe as one would write it"
    return repr(recipe(name, budget['epochs'], peer=lambda: Three(4), head=lambda: projection_head(64)))

# -- a file that every step is written to
def measure(name, file, seeds, costs):
    known = json.loads(file.read_text()) if file.exists() else {}
    def keep(**new):
        known.setdefault(name, {}).update(new)
        file.write_text(json.dumps(known, indent=1, sort_keys=True)+'\n')
        print(name, *new, flush=True, file=sys.stderr)
    if name!='alone':
        if 'tried' not in known.get(name, {}): keep(recipe=written(name), tried=tried(name))
        if costs and 'cost' not in known[name]:
            try: keep(cost=cost(name))
            except ValueError as e: keep(cost=None, cost_refused=said(e))
    runs = known.get(name, {}).get('runs', [])
    for seed in range(len(runs), seeds):
        try:
            with redirect_stdout(None): runs.append(trained(name, seed))
        except ValueError as e: return keep(refused=said(e))
        keep(runs=runs)

@call_parse
def main(
    method:str='',       # Only this one, or several with commas between
    seeds:int=3,         # Runs of each
    no_cost:bool=False,  # Leave out what a step costs
    again:bool=False,    # Not what the file has, but anew
    file:Path=here/'methods.json', # Where results are kept: what is in it is not run again
):
    "Train, time and try every method of `recipes.py`, and keep the numbers in a JSON file"
    torch.set_num_threads(1)
    asked = method.split(',') if method else ['alone',*recipes]
    unknown = [n for n in asked if n not in ('alone',*recipes)]
    if unknown: sys.exit(f'{", ".join(unknown)}: no such method; there are {", ".join(recipes)}')
    if again and file.exists():
        known = json.loads(file.read_text())
        for n in asked: known.pop(n, None)
        file.write_text(json.dumps(known))
    before = os.getloadavg()
    for name in asked: measure(name, file, seeds, not no_cost)
    known = json.loads(file.read_text())
    known['how'] = dict(machine=where('methods.py', torch.device('cpu'), True, before), budget=budget,
                        teacher=dict(accuracy=share(teacher(), images()[1][1]), parameters=n_params(teacher())))
    file.write_text(json.dumps(known, indent=1, sort_keys=True)+'\n')
