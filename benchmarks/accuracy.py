"""What distillation is worth on CIFAR-100: students alone and taught, at the last epoch, mean and deviation over seeds.

python benchmarks/accuracy.py --budget short --data DIR --teachers DIR --jobs 12 --write benchmarks/accuracy.md"""
import json
import multiprocessing
import os
import pickle
import platform
import statistics
import sys
import time
from collections import namedtuple
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import fastai
import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback,CancelFitException,TrainEvalCallback
from fastai.callback.fp16 import AMPMode,MixedPrecision
from fastai.callback.schedule import ParamScheduler,combined_cos
from fastai.data.core import DataLoaders
from fastai.learner import AvgSmoothLoss,Learner
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from fastcore.script import call_parse
from models import PublishedResNet,resnet8,resnet20,resnet56,wide_stem
from safetensors.torch import load_file
from speed import table
from torch import nn

import fasterdistill
from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import TaskLoss,ramp
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.consistency import CSKD,DDGSD
from fasterdistill.losses.dkd import DKD
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.losses.sad import SAD
from fasterdistill.losses.uskd import USKD

# -- what is compared: an arm, a teacher, a student, a budget is a line

def one_cycle(lr, epochs): return combined_cos(.25, lr/25, lr, lr/1e5)
def steps(lr, epochs):
    "A tenth at 5/8, 6/8 and 7/8: of 240 epochs at 150, 180 and 210"
    return lambda pos: lr*.1**sum(pos+1e-9>=n/8 for n in (5,6,7))

Budget = namedtuple('Budget', 'per_class epochs bs lr wd nesterov schedule')
budgets = {
    'cpu': Budget(50, 20, 64, .05, 5e-4, True, one_cycle),     # the first 50 images of each class
    'short': Budget(500, 25, 128, .1, 5e-4, True, one_cycle),
    'gpu': Budget(500, 240, 64, .05, 5e-4, False, steps),      # the recipe of the papers
}
stages = ['layer1','layer2','layer3']
arms = {                                                       # each gets the number of epochs
    'alone': None,
    'SoftTarget': lambda n: .1*TaskLoss()+.9*SoftTarget(T=4),
    'DKD': lambda n: TaskLoss()+ramp(max(n//12, 1))*DKD(alpha=1, beta=8, T=4),
    'Attention': lambda n: TaskLoss()+1000*Attention().at(stages),
    'FCFD': lambda n: TaskLoss()+FCFD(weight=.02, warmup=max(n//12, 1)).at(stages),
    'SAD': lambda n: TaskLoss()+.1*SAD().at(stages),           # from here on without the teacher
    'USKD': lambda n: TaskLoss()+USKD(alpha=.1, mu=.1).at('layer2'),
    'CSKD': lambda n: TaskLoss()+CSKD(T=4),
    'DDGSD': lambda n: .5*TaskLoss()+DDGSD(T=4),
}
students = dict(resnet8=resnet8, resnet20=resnet20, resnet56=resnet56)

Teacher = namedtuple('Teacher', 'make mean std accuracy origin')     # accuracy: as stated with the weights, or None
ours = (.507,.487,.441),(.267,.256,.276)
def distiller(depth, accuracy):
    return Teacher(partial(wide_stem, depth), *ours, accuracy, 'karanchahal/distiller, no licence stated')
teachers = {
    'resnet32': Teacher(partial(PublishedResNet, 32), (.5071,.4867,.4408), (.2675,.2565,.2761), 69.51,
                        'snu-ccl/FHE-MP-CNN, no licence stated'),
    'resnet32_wide_stem': distiller(32, 71.69), 'resnet26_wide_stem': distiller(26, 71.06),
    'resnet20_wide_stem': distiller(20, 69.69), 'resnet14_wide_stem': distiller(14, 68.30),
    'resnet8_wide_stem': distiller(8, 64.11),
}

# -- data
def read(data, split):
    "Images `(N,3,32,32)` as uint8 and fine labels of the standard layout, `cifar-100-python/train` and `test`"
    path = Path(data)/'cifar-100-python'/split
    if not path.exists(): sys.exit(f'{path} is not there: --data (or CIFAR100) names the folder it was unpacked in')
    with open(path, 'rb') as f: d = pickle.load(f, encoding='latin1')
    return torch.tensor(d['data']).view(-1, 3, 32, 32),torch.tensor(d['fine_labels'])

def first_of_each(images, labels, n):
    "The first `n` of each class, in their order"
    keep = torch.cat([(labels==c).nonzero()[:n,0] for c in labels.unique()]).sort().values
    return images[keep],labels[keep]

class Batches:
    """A loader of images that lie on the device as uint8. With a `seed` they are shuffled, cropped out of 4 black
    pixels more on each side and flipped, by the seed and `epoch` alone"""
    epoch = 0
    def __init__(self, images, labels, bs, teacher, device, seed=None, layout=torch.contiguous_format):
        self.bs,self.seed,self.layout,self.device = bs,seed,layout,device
        if seed is not None: images = F.pad(images, (4,)*4)
        self.images,self.labels = images.to(device),labels.to(device)
        self.mean,self.std = (255*torch.tensor(o, device=device).view(-1, 1, 1) for o in (teacher.mean,teacher.std))
    def __len__(self): return -(-len(self.labels)//self.bs)
    def drawn(self):
        "The whole epoch, in its order"
        n,size,rng = len(self.labels),self.images.shape[-1]-8,np.random.default_rng([self.seed, self.epoch])
        order,(dy,dx),flip = rng.permutation(n),rng.integers(0, 9, (2,n,1)),rng.random((n,1))<.5
        rows,cols = dy+np.arange(size),dx+np.where(flip, np.arange(size)[::-1], np.arange(size))
        i,c,rows,cols = (torch.tensor(o, device=self.device) for o in (order,np.arange(3),rows,cols))
        places = i[:,None,None,None],c[:,None,None],rows[:,None,:,None],cols[:,None,None,:]
        return self.images[places],self.labels[i]
    def __iter__(self):
        images,labels = (self.images,self.labels) if self.seed is None else self.drawn()
        for x,y in zip(images.split(self.bs), labels.split(self.bs), strict=True):
            yield ((x.float()-self.mean)/self.std).contiguous(memory_format=self.layout),y

# -- a run
Run = namedtuple('Run', 'budget_name budget student teacher arm seed options')
Options = namedtuple('Options', 'bf16 compile channels_last')
Where = namedtuple('Where', 'data teachers out device')
def name_of(run): return f'{run.budget_name}-{run.teacher}-{run.student}-{run.arm}-{run.seed}'
def settings(run):
    "What must be the same in all runs of a table, as JSON has it"
    budget = run.budget._replace(schedule=run.budget.schedule.__name__)
    return dict(budget=run.budget_name, teacher=run.teacher, student=run.student, **budget._asdict(),
                **run.options._asdict())

class Recorder(Callback):
    """In the place of fastai's, which brings a number to the host every step: here loss on the labels and hits are
    summed on the device and read once an epoch"""
    name,order = 'recorder',50
    def before_fit(self):
        self.lrs,self.losses,self.iters,self.values,self.smooth_loss = [],[],[],[],AvgSmoothLoss()
    def before_epoch(self): self.log,self.started = L(self.epoch),time.time()
    def before_train(self): self.total,self.dls.train.epoch = 0.,self.epoch
    def before_validate(self): self.hits = 0
    def after_batch(self):
        if self.training: self.total = self.total+self.learn.loss.detach()
        else: self.hits = self.hits+(self.pred.argmax(1)==self.y).sum()
    def after_validate(self):
        hits = 100*float(self.hits)/len(self.dls.valid.labels)
        self.log += [float(self.total)/len(self.dls.train),hits,time.time()-self.started]
    def after_epoch(self): self.values.append(self.log[1:])

class Results(Callback):
    "A run's JSON file after each epoch, once its checkpoint is written; the end of the fit at `deadline`"
    order = Checkpoint.order+1
    def __init__(self, file, facts, deadline): self.file,self.facts,self.deadline = file,facts,deadline
    def before_fit(self): self.trained = False
    def before_batch(self):
        if time.time()>self.deadline: raise CancelFitException
    def after_validate(self): self.trained = True
    def after_epoch(self):
        if not self.trained: return                      # an epoch of the checkpoint, on the way to where it stopped
        losses,accuracies,seconds = zip(*self.recorder.values, strict=True)
        kd = getattr(self.learn, 'knowledge_distillation', None)
        now = dict(epochs_done=self.epoch+1, steps_done=self.train_iter, loss=losses, accuracy=accuracies,
                   seconds=seconds, parts=[] if kd is None else kd.history)
        write(self.file, json.dumps(self.facts|now, indent=1))
        print(f'{self.file.stem}: epoch {self.epoch+1} of {self.n_epoch}, {accuracies[-1]:.2f} %, '
              f'loss {losses[-1]:.3f}, {seconds[-1]:.1f} s', flush=True)

def write(file, text):
    "The whole file or none of it"
    tmp = file.with_suffix('.tmp')
    tmp.write_text(text, encoding='utf-8')
    os.replace(tmp, file)

def machine(device):
    chip = torch.cuda.get_device_name(device) if device.type=='cuda' else f'{platform.machine()} {device.type}'
    return (f'{chip}; torch {torch.__version__}, fastai {fastai.__version__}, '
            f'fasterdistill {fasterdistill.__version__}, Python {platform.python_version()}')

def taught_by(name, folder, test, device, layout=torch.contiguous_format):
    "A teacher and its accuracy on `test`, measured; the end if that is not the one it came with"
    teacher = teachers[name]
    model = teacher.make().to(device, memory_format=layout).eval()
    model.load_state_dict(load_file(str(Path(folder)/f'{name}.safetensors')))
    with torch.no_grad(): hits = sum((model(x).argmax(1)==y).sum() for x,y in test)
    got = 100*float(hits)/len(test.labels)
    if teacher.accuracy is not None and abs(got-teacher.accuracy)>.15:
        raise ValueError(f'{name} is right on {got:.2f} % of {len(test.labels)} test images, but came with '
                         f'{teacher.accuracy} %: other data, another normalisation or another order of classes')
    return model,got

def fit(run, data, where, device, deadline=float('inf'), cbs=()):
    "Train a student, or go on from where its checkpoint is"
    b,opts = run.budget,run.options
    file,layout = where.out/f'{name_of(run)}.json',torch.contiguous_format
    if opts.channels_last: layout = torch.channels_last
    batches = partial(Batches, teacher=teachers[run.teacher], device=device, layout=layout)
    train,test = batches(*first_of_each(*data[0], b.per_class), b.bs, seed=run.seed),batches(*data[1], 1000)
    torch.manual_seed(run.seed)
    model = students[run.student]().to(device, memory_format=layout)
    facts,cbs = dict(settings=settings(run), arm=run.arm, seed=run.seed, machine=machine(device)),[*cbs]
    if arms[run.arm]:
        loss,teacher = arms[run.arm](b.epochs),None
        facts['expression'] = repr(loss)
        if {'teacher_pred','fm_t','teacher'} & loss.reads.keys():
            teacher,facts['teacher_accuracy'] = taught_by(run.teacher, where.teachers, test, device, layout)
        cbs.append(KnowledgeDistillationCallback(teacher, loss, columns=False))
    if opts.bf16: cbs.append(MixedPrecision(amp_mode=AMPMode.BF16))
    if opts.compile: model.compile()
    opt = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=b.nesterov)
    cbs += [TrainEvalCallback(),Recorder(),Results(file, facts, deadline),Checkpoint(file.stem, resume='auto'),
            ParamScheduler({'lr': b.schedule(b.lr, b.epochs)})]
    learn = Learner(DataLoaders(train, test), model, loss_func=nn.CrossEntropyLoss(), opt_func=opt, wd=b.wd,
                    path=where.out, model_dir='checkpoints', cbs=cbs, default_cbs=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(b.epochs, b.lr)
    return learn

def unfinished(run, out):
    "Whether epochs are left; the end if what is there was run with other settings"
    file = out/f'{name_of(run)}.json'
    if not file.exists(): return True
    was,now = json.loads(file.read_text()),settings(run)
    other = [f'{k} = {was["settings"][k]}, not {v}' for k,v in now.items() if was['settings'].get(k)!=v]
    if other: sys.exit(f'{file} was run with {"; ".join(other)}: another --out is needed')
    return was['epochs_done']<run.budget.epochs

def one(run, where, deadline):
    "A run in a process of its own"
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True            # going on ends as not stopping
    device = torch.device(where.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    fit(run, [read(where.data, split) for split in ('train','test')], where, device, deadline)

def side_by_side(runs, where, jobs, deadline):
    "All of them, `jobs` processes at a time; the names of those that failed"
    context,waiting,going,failed = multiprocessing.get_context('spawn'),list(runs),{},[]
    while True:
        while waiting and len(going)<jobs and time.time()<deadline:
            process = context.Process(target=one, args=(waiting[0],where,deadline), daemon=True)
            process.start()
            going[process.sentinel] = process,waiting.pop(0)
        if not going: return failed                      # all are done, or the time is over
        for sentinel in wait(list(going)):
            process,run = going.pop(sentinel)
            process.join()
            if process.exitcode: failed.append(name_of(run))

# -- what is written
head = ('arm','loss','seeds','epochs done','steps','last accuracy, %','beside alone','s/epoch','agreement')

def spread(values, sign=''):
    if not values: return ''
    mean = f'{statistics.mean(values):{sign}.2f}'
    return mean if len(values)==1 else f'{mean} ± {statistics.stdev(values):.2f}'

def row(arm, runs, alone):
    "A row of the runs of an arm, by seed; only those that are whole have an accuracy"
    last,all_runs = finals(runs),list(runs.values())
    beside = [last[s]-alone[s] for s in last if s in alone and arm!='alone']
    agree = [runs[s]['parts'][-1]['agreement'] for s in last if 'agreement' in (runs[s]['parts'] or [{}])[-1]]
    loss = {f"`{r['expression']}`" for r in all_runs if 'expression' in r}
    done = [f"{r['epochs_done']} of {r['settings']['epochs']}" for r in all_runs]
    seconds = f"{statistics.median(sum((r['seconds'] for r in all_runs), [])):.1f}" if runs else ''
    steps = {f"{r['steps_done']:,}" for r in all_runs}
    return (arm, *(', '.join(sorted(o)) for o in (loss,map(str, runs),set(done),steps)),
            spread(list(last.values())), spread(beside, '+'), seconds, spread(agree))

def finals(runs):
    "The last accuracy of those whose epochs are all done, by seed"
    return {s: r['accuracy'][-1] for s,r in sorted(runs.items()) if r['epochs_done']==r['settings']['epochs']}

def report(out):
    "A table for each budget and pair that has files in `out`, a line for each arm"
    groups = {}
    for f in sorted(out.glob('*.json')):
        r = json.loads(f.read_text())
        groups.setdefault(json.dumps(r['settings']), {}).setdefault(r['arm'], {})[r['seed']] = r
    return '\n\n'.join(part(json.loads(k), by_arm) for k,by_arm in groups.items())

def part(setting, by_arm):
    s,runs = dict(setting),[r for rs in by_arm.values() for r in rs.values()]
    alone = finals(by_arm.get('alone', {}))
    measured = next((f"{r['teacher_accuracy']:.2f} %" for r in runs if 'teacher_accuracy' in r), 'not asked')
    title = f"## {s.pop('budget')}: {s['teacher']} → {s['student']}"
    origin = teachers[s['teacher']].origin
    said = f"Teacher `{s.pop('teacher')}` ({origin}), on the test images here: {measured}. Settings: " \
           + ', '.join(f'{k} {v}' for k,v in s.items())+'.'
    rows = [row(a, by_arm.get(a, {}), alone) for a in arms]
    return '\n\n'.join([title,said,table(head, rows),*sorted({r['machine'] for r in runs})])

legend = """*last accuracy*: on the 10,000 test images after the last epoch, not the best one; mean ± deviation over \
the seeds whose epochs are all done. *beside alone*: points more than the student alone with the same seed, first \
weights and batches. *agreement*: the share of the last epoch's training items of which student and teacher said the \
same. *s/epoch*: as it was with the runs side by side. An arm without numbers has not been run."""

def known(what, name, names):
    if name in names: return name
    sys.exit(f'--{what} {name}: expected one of {", ".join(names)}')

@call_parse
def main(
    budget:str='cpu',        # cpu: 5,000 images; short: all of them, few epochs; gpu: the papers' 240 epochs
    student:str='resnet20',  # resnet8, resnet20, resnet56
    teacher:str='resnet32_wide_stem', # One of the trained networks
    arm:str='',              # Only these arms, with commas between
    seeds:str='0,1,2',       # With commas between
    epochs:int=0,            # As many instead of the budget's
    data:str='',             # Folder that holds cifar-100-python; the default is the environment's CIFAR100
    teachers_in:str='',      # Folder of the .safetensors; the default is the environment's CIFAR100_TEACHERS
    out:str='accuracy_runs', # Folder of results and checkpoints: the same command goes on from there
    jobs:int=1,              # Runs side by side, each a process with one thread
    limit_seconds:float=0,   # Stop all after so long and keep the checkpoints; 0: never
    device:str='',           # cpu, cuda, …; the default is a GPU where there is one
    bf16:bool=False,         # fastai's MixedPrecision, on a GPU
    compile:bool=False,      # Compile the student
    channels_last:bool=False,# Channels last in memory
    only_table:bool=False,   # Run nothing, write the table
    write_to:str='',         # Markdown file for the table of all that is in `out`
):
    "Train students of CIFAR-100 alone and taught, and compare them at the last epoch"
    deadline = time.time()+(limit_seconds or float('inf'))
    where = Where(data or os.environ.get('CIFAR100', '.'), teachers_in or os.environ.get('CIFAR100_TEACHERS', '.'),
                  Path(out), device)
    where.out.mkdir(parents=True, exist_ok=True)
    asked = [known('arm', a, arms) for a in arm.split(',')] if arm else list(arms)
    spec = budgets[known('budget', budget, budgets)]
    if epochs: spec = spec._replace(epochs=epochs)
    first = Run(budget, spec, known('student', student, students), known('teacher', teacher, teachers), '', 0,
                Options(bf16, compile, channels_last))
    runs = [first._replace(arm=a, seed=int(s)) for s in seeds.split(',') for a in asked]
    failed = [] if only_table else side_by_side([r for r in runs if unfinished(r, where.out)], where, jobs, deadline)
    text = report(where.out)
    print(text)
    if write_to: write(Path(write_to), f'Written by `accuracy.py`.\n\n{text}\n\n{legend}\n')
    if failed: sys.exit(f'failed, see above: {", ".join(failed)}')
