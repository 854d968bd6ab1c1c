"""What works with what in fastai: tasks and ways of training × the loss picked for the task, a feature loss with
adapters, FCFD. A cell is ✓ where a fit with the callback does what the same fit does whose losses are written into the
Learner's loss function (written.py); ✗ where it is refused before training, with the reason. What a single fit computes
and leaves alone, and every way out of it, is in test_callback.py; conftest.py prints the table."""
import copy
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import fastai.callback.hook  # noqa: F401, gives the Learner its summary()
import matrix
import numpy as np
import pandas as pd
import pytest
import test_processes
import torch
import torch.nn.functional as F
from common import (KD,At,HalfCPU,StepLosses,Real,Rounded,X,Y,_block,assert_close,assert_same,cpu,floating,furthest,
                    get_dls,hf_block,hf_vit,kl_each,learner,left,loud,lr,lstm,net,raising,rnn,seed,state,tuples,
                    unlabelled)
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler,SchedCos,SchedLin
from fastai.callback.tracker import EarlyStoppingCallback,SaveModelCallback,TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,LabelSmoothingCrossEntropyFlat,MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai.tabular.core import Categorify,FillMissing,FillStrategy,Normalize,TabularPandas
from fastai.tabular.model import TabularModel,get_emb_sz
from fastai.text.data import LMDataLoader
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_clas_config,awd_lstm_lm_config
from fastai.text.models.core import get_language_model,get_text_classifier
from fastai.torch_core import TensorImage
from fastai.vision.models.unet import DynamicUnet
from fastcore.basics import noop
from fastcore.foundation import L
from sklearn import datasets
from test_inputs import Wrapped,data
from torch import nn
from written import Written,bernoulli,columns

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.missing import MissingLabels
from fasterdistill.teachers.teacher import Frozen

def found(row, column, what='✓'): matrix.found.cells[row,column] = what

# ---- a row is a task and a way of training ----

class Task(SimpleNamespace):
    """`make(width, seed)` a network, `dls()`, `loss()`, what `kd` is by hand, and layers: those that losses find
    by themselves; for FitNet (`told`) and FCFD (`cuts`), what `.at` is given where they find none"""
    found = ['layer1','layer2','layer3']
    told = cuts = output = ignore_index = None
    lr = lr
    make = staticmethod(lambda w, s: net(w, s=s))
    taught = staticmethod(lambda t: t)                                  # the same teacher as the callback gets it
    loss = CrossEntropyLossFlat
    cbs = staticmethod(lambda: [])
    select = staticmethod(lambda o: o)
    label = staticmethod(lambda yb: yb[0])
    def dls(self): return get_dls(shuffle=False)
    def kd(self, s, t, y, T=4.): return kl_each(s, t, T).mean()
    def to_find(self, column): return {columns[0]: [], columns[1]: self.found[-1:], columns[2]: self.found}[column]
    def term(self, column):
        "The column's loss as a reader has to write it: bare, or where that is refused, with its layers named"
        loss,layers = (FitNet(),self.told) if column==columns[1] else (FCFD(),self.cuts)
        return loss.at(*layers) if layers and self.refuses(loss) else loss
    def refuses(self, loss):
        with floating(torch.float32):
            learn = learner(self.make(4, 0), self.dls(), loss_func=self.loss(), metrics=[], cbs=self.cbs())
            try: KD(self.teaching(self.make(8, 1)), TaskLoss()+loss, output=self.output,
                    ignore_index=self.ignore_index).plan(learn)
            except ValueError: return True
        return False
    def teaching(self, teacher): return teacher if self.output is None else Frozen(teacher, output=self.output)
    def callback(self, column, teacher, weight=None):
        t,said = self.teaching(teacher),dict(output=self.output, ignore_index=self.ignore_index)
        if column==columns[0]: return KD(t, **said, **({} if weight is None else dict(weight=weight)))
        loss = self.term(column)
        return KD(t, TaskLoss()+(loss if weight is None else weight*loss), **said)

def fit(learn, cbs): learn.fit(2, cbs=cbs)

class Way(SimpleNamespace):
    "`run(learn, cbs)`, with what the Learner is made of; `other`: what differs for the other opinion, to no effect"
    run = staticmethod(fit)
    dls = loss = other = weight = splitter = None
    cut,dtype = False,torch.float64                                     # cut short: no epoch of it ends
    make = staticmethod(lambda: {})
    student = teacher = staticmethod(lambda m: m)
    def differently(self): return Way(**{**vars(self), **(self.other or {})})

def made(task, way, path):
    student = way.student(task.make(4, 0).train())
    seed(2)
    learn = learner(student, (way.dls or task.dls)(), loss_func=(way.loss or task.loss)(), metrics=[], path=path,
                    cbs=[Real(),*task.cbs()], **way.make())
    if way.splitter: learn.splitter = way.splitter
    learn.lr = task.lr
    return learn

def outcome(learn, res, losses, term):
    valid = [v for o in learn.recorder.values for v in list(o)[1:2]]
    return SimpleNamespace(weights=state(learn.model), learned={} if term is None else state(term), losses=losses.vals,
                           valid=[v for v in valid if isinstance(v, float)], res=res, rows=len(learn.recorder.losses))

def read_by(cb):
    "The layers that a loss reads in the fit under way, the student's and the teacher's"
    terms = list(cb.teaching.terms)
    return [[n for t in terms for n in t.layers[who].values()] for who in ('student','teacher')]

def with_callback(task, way, column, path):
    "What comes of the fit; a copy of the loss as it began, the layers it reads, and how it is written"
    teacher = way.teacher(task.make(8, 1).train())
    given = task.taught(teacher)
    asked = given.model if isinstance(given, Learner) else given
    learn,losses,start = made(task, way, path),StepLosses(),[]
    had,was = left(learn, asked),state(asked)
    cb = task.callback(column, given, way.weight)
    def keep(l):
        if l.training and not start: start.extend((copy.deepcopy(cb.loss),read_by(cb)))
    seed(3)
    res = way.run(learn, [cb,At('after_pred', keep),losses])
    assert left(learn, asked)==had
    assert cb.history or way.cut
    assert_same(was, state(asked), 'the teacher')
    term = None if column==columns[0] else cb.loss.losses[1]
    if not named(term): assert start[1]==[task.to_find(column)]*2
    return outcome(learn, res, losses, term),*start,named(term)

def named(term):
    "What stands behind the loss of a term, `.at(…)` or nothing"
    return '' if term is None else repr(term).removeprefix(f'{type(term).__name__}()')

def by_hand(task, way, column, path, start, pairs, *more):
    "The same of a Learner whose loss function distils, from the learned parts of the loss `start` on"
    learn,losses = made(task, way, path),StepLosses()
    teacher = way.teacher(task.make(8, 1).train())
    own = learn.loss_func = Written(learn, task, column, teacher, start, pairs, way.weight)
    split = learn.splitter if way.splitter else lambda m: [list(m.parameters())]
    def splitter(m):
        *groups,last = split(m)
        return [*groups,[*last,*own.parameters()]]
    learn.splitter = splitter
    def clip(l):
        clips = [c for c in l.cbs if isinstance(c, GradientClip)]
        if own.parameters():
            for c in clips: nn.utils.clip_grad_norm_(own.parameters(), c.max_norm, c.norm_type)
    def reset(l):
        if hasattr(teacher, 'reset'): teacher.reset()
    more = [*more, At('before_step', clip, order=GradientClip.order+1), At('before_train', reset)]
    seed(3)
    res = way.run(learn, [*more,losses])
    own.remove()
    return outcome(learn, res, losses, own.term)

def apart(a, b):
    "The largest difference of two outcomes"
    numbers = [abs(p-q) for k in ('losses','valid') for p,q in zip(getattr(a, k), getattr(b, k), strict=True)]
    return max(*numbers, furthest(a.weights, b.weights), furthest(a.learned, b.learned))

def equal(a, b, tol=1e-10):
    "Two fits took the same steps"
    assert len(a.losses)==len(b.losses)>1
    assert a.rows==b.rows
    assert a.res==b.res
    np.testing.assert_allclose(a.losses, b.losses, rtol=tol, atol=tol)
    np.testing.assert_allclose(a.valid, b.valid, rtol=tol, atol=tol)
    if np.isnan(b.losses).any():
        assert all(torch.allclose(p, b.weights[k], rtol=tol, atol=tol, equal_nan=True) for k,p in a.weights.items())
    else:
        assert_close(a.weights, b.weights, tol)
        assert_close(a.learned, b.learned, tol)

def compare(task, column, path, way):
    """With the callback as by hand: in float64 to 1e-10, in half precision to what one rounding of the inputs changes.
    Returns what a cell says: ✓, and what a reader has to write behind the loss"""
    with floating(way.dtype):
        a,start,pairs,at = with_callback(task, way, column, path/'a')
        def hand(path, *more): return by_hand(task, way.differently(), column, path, copy.deepcopy(start), pairs, *more)
        b,tol = hand(path/'b'),1e-10
        if way.dtype!=torch.float64: tol = min(apart(b, hand(path/'c', Rounded())), 2e-3)
    equal(a, b, tol)
    return f'✓ with `{at}`' if at else '✓'

# ---- tasks ----

def images(y): return lambda: tuples([TensorImage(x) for x in X[:160]], y[:160], drop_last=True)
several = torch.stack([Y%2==0, Y>4, (Y==2)|(Y==3)|(Y==5)|(Y==7)], 1).float()
def centre(ink):
    "Of pictures `(B,8,8)`, from -1 to 1 each way: (B,2)"
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)]*2, indexing='ij'))
    return (ink[:,None]*grid).sum((2,3))/ink.sum((1,2))[:,None]
points = torch.stack([centre(X[:,0]), centre(X[:,0]**4)], 1)            # two centres of the ink, (B,2,2)

def unet(w, s):
    seed(s)
    body = nn.Sequential(_block(1, w, 2, True), _block(w, 2*w, 2, True), _block(2*w, 4*w, 2, True))
    return DynamicUnet(body, 3, (32,32))
def masks():
    x = F.interpolate(X[:48], scale_factor=4)
    y = (x[:,0]>.3).long()+(x[:,0]>.8).long()
    y[:,:2] = y[:,-3:] = 255                                           # not labelled
    return tuples([TensorImage(o) for o in x], y, n=32, valid=16, bs=16, drop_last=True)
def masked(s, t, y, T=4.): return kl_each(s, t, T)[(y!=255).reshape(-1)].mean()

# texts

texts = [o.DESCR.lower().split() for o in (
    datasets.load_digits(),datasets.load_wine(),datasets.load_iris(),datasets.load_breast_cancer())]
words = ['xxunk','xxpad',*sorted({w for t in texts for w in t})]
tokens = [torch.tensor([words.index(w) for w in t]) for t in texts]

def snippets():
    "24 words on from somewhere in a text, some shorter, and which text it is"
    g = torch.Generator().manual_seed(0)
    which = torch.randint(4, (160,), generator=g)
    at = [torch.randint(len(tokens[c])-24, (), generator=g).item() for c in which.tolist()]
    x = torch.stack([tokens[c][i:i+24] for c,i in zip(which.tolist(), at)])
    x[::3,18:] = 1
    return tuples(x, which, drop_last=True)
def named_snippets():
    dls = snippets()
    dls.vocab = (words,list('abcd'))
    return dls
def stream():
    seed()
    def load(*texts): return LMDataLoader(list(texts), bs=4, seq_len=11, shuffle=False, device=cpu)
    return DataLoaders(load(tokens[0][:300], tokens[1][:200]), load(tokens[2][:200]))
def classifier(w, s):
    seed(s)
    config = awd_lstm_clas_config|lstm(w)
    return get_text_classifier(AWD_LSTM, len(words), 4, seq_len=10, config=config, lin_ftrs=[3*w])
def language(w, s):
    seed(s)
    model = get_language_model(AWD_LSTM, len(words), config=awd_lstm_lm_config|lstm(w))
    return loud(model, 4)                                              # what was read before is seen in the prediction
def tokenwise(s, t, y, T=4.): return kl_each(s, t, T, -1).mean()

def other_words(t):
    "The text teacher as it would be, had it numbered the words in another order"
    m,order = classifier(8, 1),[0,1,*reversed(range(2, len(words)))]
    m.load_state_dict(t.state_dict())
    with torch.no_grad(): m[0].module.encoder.weight.copy_(t[0].module.encoder.weight[order])
    dls = snippets()
    dls.vocab = ([words[i] for i in order],list('abcd'))
    return Learner(dls, m, loss_func=CrossEntropyLossFlat(), cbs=rnn())

def bert(w, s):
    "Hugging Face's, of four blocks, with nothing left out at random"
    from transformers import BertConfig,BertForSequenceClassification
    seed(s)
    return BertForSequenceClassification(BertConfig(
        vocab_size=len(words), hidden_size=2*w, num_hidden_layers=4, num_attention_heads=2, intermediate_size=4*w,
        num_labels=4, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))

# signals, volumes

def over(dims):
    "`(width, seed)` to three stages of convolutions over so many dimensions"
    conv,norm,pool = {1: (nn.Conv1d,nn.BatchNorm1d,nn.AdaptiveAvgPool1d),
                      3: (nn.Conv3d,nn.BatchNorm3d,nn.AdaptiveAvgPool3d)}[dims]
    def block(i, o, stride): return nn.Sequential(conv(i, o, 3, stride, 1), norm(o), nn.ReLU(inplace=True))
    def make(w, s):
        seed(s)
        return nn.Sequential(OrderedDict(
            layer1=block(1, w, 1), layer2=block(w, 2*w, 2), layer3=block(2*w, 4*w, 2),
            pool=pool(1), flat=nn.Flatten(), fc=nn.Linear(4*w, 10)))
    return make
def signals(): return tuples(X[:160].flatten(2), Y[:160], drop_last=True)
def volumes(): return tuples(X[:160,:,None].repeat(1, 1, 4, 1, 1), Y[:160], drop_last=True)

# tables

cats,conts = ['alcohol','hue','ash'],['malic_acid','magnesium','flavanoids','proline']

def wines():
    "scikit-learn's: three columns in classes, one of them with gaps, four numbers, some missing"
    d = datasets.load_wine(as_frame=True).frame
    d = d.sample(frac=1, random_state=0).reset_index(drop=True)
    d.columns = [c.split('/')[0] for c in d.columns]
    for c in cats: d[c] = pd.cut(d[c], 4, labels=list('abcd')).astype(str)
    d.loc[::7,'hue'] = None
    d.loc[::11,'proline'] = float('nan')
    return d
def table(d=None, fill=FillMissing, step=1, splits=(range(128),range(128, 178))):
    return TabularPandas(
        wines() if d is None else d, procs=[Categorify,fill,Normalize], cat_names=cats[::step],
        cont_names=conts[::step],
        y_names='target', y_block=CategoryBlock(), splits=[list(o) for o in splits])
def proc(to, cls): return next(p for p in to.procs if isinstance(p, cls))
def rows_and_columns():
    seed()
    return table().dataloaders(bs=32, device=cpu, shuffle=False)
def tabular(w, s):
    to = table()
    seed(s)
    return TabularModel(get_emb_sz(to), len(to.cont_names), 3, [4*w,2*w])

def other_rows():
    "More categories, columns the other way round, other means"
    d = pd.concat([wines().iloc[30:], wines().iloc[:9].assign(alcohol='aa', ash='bb')], ignore_index=True)
    fill = FillMissing(FillStrategy.constant, fill_vals=proc(table(), FillMissing).na_dict)
    return table(d, fill, -1, (range(20, len(d)),range(20)))

def other_codes(t):
    "The tabular teacher as it would be, had it learned from `other_rows`"
    a,b,m = table(),other_rows(),copy.deepcopy(t)
    ia,ic = [a.cat_names.index(n) for n in b.cat_names],[a.cont_names.index(n) for n in b.cont_names]
    with torch.no_grad():
        embeddings_of(m, t, a, b, ia)
        numbers_of(m.bn_cont, proc(a, Normalize), proc(b, Normalize), b.cont_names, ic)
        dims = [e.embedding_dim for e in t.embeds]
        start = np.cumsum([0,*dims])
        moved = [*(o for i in ia for o in range(start[i], start[i+1])), *(start[-1]+i for i in ic)]
        weight = m.layers[0][0].weight
        weight.copy_(weight[:,moved].clone())
    return Learner(b.dataloaders(bs=32, device=cpu), m, loss_func=CrossEntropyLossFlat())

def embeddings_of(m, t, a, b, ia):
    "`m` has the embeddings of `t`, which reads the codes of table `a`, for those of `b`"
    for j,(name,i) in enumerate(zip(b.cat_names, ia)):
        m.embeds[j] = nn.Embedding(len(b.classes[name]), t.embeds[i].embedding_dim)
        for k,c in enumerate(b.classes[name]):
            if c in list(a.classes[name]): m.embeds[j].weight[k] = t.embeds[i].weight[list(a.classes[name]).index(c)]

def numbers_of(bn, na, nb, names, ic):
    "BatchNorm after the normalisation `nb`, in the order of `names`, where it was after `na`: x = k*x'+c"
    def wide(stats): return torch.tensor([float(stats[n]) for n in names], dtype=bn.weight.dtype)
    k,c = wide(nb.stds)/wide(na.stds),(wide(nb.means)-wide(na.means))/wide(na.stds)
    for v in (bn.weight,bn.bias,bn.running_mean,bn.running_var): v.copy_(v[ic].clone())
    bn.running_mean.sub_(c).div_(k)
    bn.running_var.add_(bn.eps).div_(k*k).sub_(bn.eps)

# outputs

def vit(w, s): return hf_vit(4*w, s, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
blocks = [n for n,m in vit(4, 0).named_modules() if type(m).__name__=='ViTLayer']

class Named(nn.Module):
    "Its prediction is one of several things in a dict"
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x):
        out = self.m(x)
        return dict(features=out.detach()*0, out=out)
class OfDict(nn.CrossEntropyLoss):
    def __init__(self, key='out'):
        super().__init__()
        self.key = key
    def forward(self, pred, y): return super().forward(pred[self.key], y)

def torch_loaders():
    from torch.utils.data import DataLoader,TensorDataset
    return DataLoaders(*(DataLoader(TensorDataset(X[at], Y[at]), 32) for at in (slice(0, 96),slice(96, 160))))

class DigitAndInk(nn.Module):
    "Which digit it is, and how dark each pixel"
    def __init__(self, w, s):
        super().__init__()
        self.m = net(w, s=s)
        self.ink = nn.Conv2d(4*w, 3, 1)
    def forward(self, x):
        z = self.m.layer3(self.m.layer2(self.m.layer1(x)))
        return self.m[3:](z),F.interpolate(self.ink(z), scale_factor=4)
class Ink(DigitAndInk):
    def forward(self, x): return super().forward(x)[1]
class OfBoth(nn.CrossEntropyLoss):
    def __init__(self): super().__init__(ignore_index=255)
    def forward(self, pred, y, ink): return F.cross_entropy(pred[0], y)+super().forward(pred[1], ink)
def own_function():
    def f(pred, y): return F.cross_entropy(pred, y, ignore_index=255)
    f.kind = 'single'
    return f
ink = (X[:160,0]>.3).long()+(X[:160,0]>.8).long()
ink[:,:2] = 255
def two_targets():
    dls = tuples([TensorImage(x) for x in X[:160]], Y[:160], ink, drop_last=True)
    dls.n_inp = 1
    return dls
layers = [f'm.layer{i}' for i in (1,2,3)]

def first(o): return o[0] if isinstance(o, tuple) else o

classified = dict(dls=snippets, cbs=rnn, select=first, found=['0[0]'], cuts=[['1.layers.0.1','1.layers.0']])
tabled = dict(make=tabular, dls=rows_and_columns, found=['layers.0','layers.1'])
tasks = {
    'single-label images': Task(),
    'multi-label images': Task(
        make=lambda w,s: net(w, 3, s=s), dls=images(several), loss=BCEWithLogitsLossFlat,
        kd=lambda s,t,y,T=1.: bernoulli(s, t, T)),
    'image regression (points)': Task(
        make=lambda w,s: net(w, 4, s=s), dls=images(points), loss=MSELossFlat,
        kd=lambda s,t,y,T=None: (s-t).pow(2).mean()),
    'segmentation (unet, ignore_index)': Task(
        make=unet, dls=masks, loss=partial(CrossEntropyLossFlat, axis=1, ignore_index=255), kd=masked, lr=.005,
        found=['layers.0.1','layers.3'], cuts=[['layers.8','layers.9']]),           # behind the last skip connection
    'text classification (AWD_LSTM)': Task(make=classifier, **classified),
    'language model (AWD_LSTM)': Task(
        make=language, dls=stream, cbs=rnn, select=first, found=['0.rnns.0[0]','0.rnns.1[0]'], kd=tokenwise,
        cuts=[['0.rnns.1[0]','1.decoder']]),
    'text classification (BERT)': Task(
        make=bert, dls=snippets, loss=partial(OfDict, 'logits'), select=lambda o: o['logits'], output='logits',
        found=[hf_block(f'bert.encoder.layer.{i}') for i in range(4)], lr=.01),
    'signals (1-D convolutions)': Task(make=over(1), dls=signals),
    'volumes (3-D convolutions)': Task(make=over(3), dls=volumes),
    'tabular (two inputs)': Task(**tabled),
    'a dict as output (output=, for both networks)': Task(
        make=lambda w,s: Named(net(w, s=s)), loss=OfDict, select=lambda o: o['out'], output='out',
        found=['m.layer1','m.layer2','m.layer3']),
    'a dict as input': Task(make=lambda w,s: Wrapped(net(w, s=s), 'dict'), dls=partial(data, 'dict'), found=layers),
    'a list of pictures as input': Task(
        make=lambda w,s: Wrapped(net(w, s=s), 'pictures'), dls=partial(data, 'pictures'), found=layers),
    'two heads, two targets (output=)': Task(
        make=DigitAndInk, dls=two_targets, loss=OfBoth, kd=masked, select=lambda o: o[1], label=lambda yb: yb[1],
        output=1, found=layers),
    'an own loss function (ignore_index=)': Task(
        make=Ink, dls=images(ink), loss=own_function, kd=masked, ignore_index=255, found=layers),
    'plain torch DataLoaders': Task(dls=torch_loaders),
    'a teacher with other table codes': Task(taught=other_codes, **tabled),
    'a teacher with other word numbers': Task(make=classifier, taught=other_words,
                                              **classified|dict(dls=named_snippets)),
    'Hugging Face networks (ViT; output=)': Task(
        make=vit, loss=partial(OfDict, 'logits'), select=lambda o: o['logits'], output='logits',
        found=['vit[last_hidden_state]'], cuts=[blocks], lr=.01),
}

@pytest.mark.parametrize('column', columns)
@pytest.mark.parametrize('name', tasks)
def test_task(name, column, tmp_path):
    found(name, column, compare(tasks[name], column, tmp_path, Way()))

# ---- ways of training ----

def halves(m): return [list(m[:2].parameters()),list(m[2:].parameters())]
def each(*makers): return lambda learn, cbs: learn.fit(2, cbs=[*cbs,*(f() for f in makers)])
def one_cycle(learn, cbs): learn.fit_one_cycle(2, .05, cbs=cbs)
def flat_cos(learn, cbs): learn.fit_flat_cos(2, .02, cbs=cbs)
def fine_tune(learn, cbs): learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=cbs)
def on_the_learner(learn, cbs):
    learn.add_cbs(cbs)
    learn.fine_tune(2, 1e-2, freeze_epochs=1)
def lr_find(learn, cbs):
    "Changes nothing: the fit after it is the first"
    was = state(learn.model)
    learn.add_cbs(cbs)
    learn.lr_find(num_it=7, show_plot=False, stop_div=False)
    assert_same(was, state(learn.model))
    cbs[-1].vals.clear()                                               # those of lr_find
    seed(3)
    learn.fit(2)
def resized(learn, cbs):
    learn.fit(1, cbs=cbs)
    larger = F.interpolate(X[:160], size=(12,12), mode='bilinear')
    learn.dls = tuples([TensorImage(x) for x in larger], Y[:160], drop_last=True)
    learn.fit(1, cbs=cbs)
def csv(learn, cbs):
    learn.path.mkdir(exist_ok=True)
    learn.fit(2, cbs=[*cbs,CSVLogger()])
    head,*rows = [r.split(',') for r in (learn.path/'history.csv').read_text().split()]
    assert head==[*learn.recorder.metric_names]
    assert [[float(o) for o in r[1:3]] for r in rows]==[[*o][:2] for o in learn.recorder.values]
    return len(rows)
def early(learn, cbs):
    learn.fit(5, cbs=[*cbs,EarlyStoppingCallback(min_delta=10.)])
    return learn.epoch
def saved(learn, cbs, **kwargs):
    """The best by validation loss, which is the Learner's own, is loaded in the end; a rate that grows makes it worse.
    What was learned beside goes back as well: with the callback by itself, in a loss function by hand"""
    cb,own,kept = SaveModelCallback(**kwargs),getattr(learn.loss_func, 'term', None),[]
    keep = At('after_epoch', lambda l: kept.append(None if own is None else state(own)))
    learn.fit(3, cbs=[*cbs,cb,keep,ParamScheduler({'lr': SchedLin(.05, 1.5)})])
    best = int(np.argmin([o[1] for o in learn.recorder.values]))
    assert cb.best==learn.recorder.values[best][1]
    if own is not None:
        assert best<2
        own.load_state_dict(kept[best])
    return best
def nan_images():
    x = X[:160].clone()
    x[40] = float('nan')
    return tuples([TensorImage(o) for o in x], Y[:160], drop_last=True)
def until_nan(learn, cbs): learn.fit(2, cbs=[*cbs,TerminateOnNaNCallback()])
def adamw(learn, cbs): learn.fit(2, 1e-2, cbs=cbs)
def torchs(opt, **kwargs): return lambda: dict(opt_func=partial(OptimWrapper, opt=partial(opt, **kwargs)))
def discriminative(learn, cbs):
    rates = SchedCos(np.array([1e-3,5e-2]), np.array([1e-4,1e-2]))
    learn.fit(2, slice(1e-3,5e-2), cbs=[*cbs,ParamScheduler({'lr': rates})])
def summary(learn, cbs):
    "Its lines but for the loss function's, which is another one on purpose"
    learn.add_cbs(cbs)
    lines = learn.summary().split('\n')
    learn.fit(2)
    return [o for o in lines if not o.lstrip().startswith('-') and 'Loss function' not in o]
class Scaled(MixedPrecision):
    "fastai's own scaling of the loss, on a CPU, with nothing to lift from half precision"
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', enabled=False),L()
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**16)
    def after_pred(self): pass
accumulated = partial(GradientAccumulation, 64)
def compiled(m):
    m.compile(backend='aot_eager')                                     # inductor itself is in test_compile.py
    return m
def twice(learn, cbs):
    for _ in range(2): learn.fit(1, cbs=cbs)
def nested(learn, cbs):
    def validate(l):
        if l.training: l.validate()
    learn.fit(2, cbs=[*cbs,At('after_batch', validate, skip=1)])
def resumed(learn, cbs):
    "Interrupted after an epoch; what is left is spoilt, and the fit goes on from the file"
    stop = At('after_epoch', raising(KeyboardInterrupt), order=80)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[*cbs,Checkpoint('half'),stop])
    kd = next(cb for cb in cbs if isinstance(cb, KD))
    with torch.no_grad():
        for p in [*learn.model.parameters(),*kd.loss.parameters()]: p.add_(1)
    seed(77)
    learn.fit(2, cbs=[*cbs,Checkpoint('half', resume=True)])
def some_missing(): return images(torch.where(torch.arange(len(Y))%3>0, Y, -100))()
class Zero(nn.CrossEntropyLoss):
    "No task while training"
    def forward(self, pred, y): return 0*pred.sum() if pred.requires_grad else super().forward(pred, y)
soft = .8*F.one_hot(Y, 10)+.2*F.one_hot((Y+1)%10, 10)

ways = {
    'fit': Way(),
    'fit_one_cycle': Way(run=one_cycle),
    'fit_flat_cos': Way(run=flat_cos),
    'fine_tune (freeze, slices)': Way(run=on_the_learner, splitter=halves),
    'fine_tune(cbs=…)': Way(run=fine_tune, splitter=halves),
    'lr_find': Way(run=lr_find, other=dict(run=fit)),
    'GradientAccumulation': Way(run=each(accumulated), dls=lambda: get_dls(128, shuffle=False)),
    'GradientClip': Way(run=each(lambda: GradientClip(.1))),
    'mixed precision (bf16, CPU)': Way(run=each(HalfCPU), dtype=torch.float32),
    'mixed precision (fp16 scaler)': Way(run=each(Scaled)),
    'ChannelsLast': Way(run=each(ChannelsLast)),
    'MixUp': Way(run=each(lambda: MixUp(.4))),
    'CutMix': Way(run=each(lambda: CutMix(1.))),
    'LabelSmoothing': Way(loss=LabelSmoothingCrossEntropyFlat),
    'progressive resizing': Way(run=resized),
    'SaveModelCallback': Way(run=saved),
    'SaveModelCallback(with_opt=True)': Way(run=partial(saved, with_opt=True)),
    'EarlyStoppingCallback': Way(run=early),
    'CSVLogger': Way(run=csv),
    'TerminateOnNaNCallback': Way(run=until_nan, dls=nan_images, cut=True),
    'OptimWrapper(torch SGD)': Way(make=torchs(torch.optim.SGD, momentum=.9)),
    'OptimWrapper(torch AdamW)': Way(make=torchs(torch.optim.AdamW, eps=1e-3), run=adamw),
    'ParamScheduler, discriminative': Way(run=discriminative, splitter=halves),
    'weight as a fastai schedule': Way(weight=SchedCos(1., .2)),
    'summary()': Way(run=summary),
    'soft labels': Way(dls=images(soft.float()), loss=nn.CrossEntropyLoss),
    'data without labels': Way(dls=unlabelled, loss=nn.CrossEntropyLoss,
                               other=dict(dls=partial(unlabelled, labels=True), loss=Zero)),
    'some labels missing': Way(run=each(MissingLabels), dls=some_missing, loss=nn.CrossEntropyLoss,
                               other=dict(run=fit)),                   # which torch's own leaves out
    'a compiled student': Way(student=compiled, other=dict(student=noop)),
    'a compiled teacher': Way(teacher=compiled, other=dict(teacher=noop)),
    'two fits': Way(run=twice),
    'a validate within the fit': Way(run=nested),
    'resumed (Checkpoint)': Way(run=resumed, other=dict(run=fit)),
    'a last batch of one': Way(dls=lambda: get_dls(97, shuffle=False, drop_last=False)),
}

@pytest.mark.parametrize('column', columns)
@pytest.mark.parametrize('name', ways)
def test_way(name, column, tmp_path):
    check = partial(compare, tasks['single-label images'], column, tmp_path, ways[name])
    if 'compiled' in name and column!=columns[0] and not hasattr(torch.compiler, 'set_stance'):
        says = 'can be read inside from torch 2.6 on'                  # test_compile.py holds the words
        with pytest.raises(ValueError, match=says): check()
        return found(name, column, '✗ from torch 2.6 on')
    found(name, column, check())

# ---- more than one process or device ----

processes = 'soft_target','fitnet','fcfd'

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory): return test_processes.two(tmp_path_factory.mktemp('two'), processes)

@pytest.mark.parametrize('column,name', list(zip(columns, processes)))
def test_two_processes(two_processes, column, name):
    "As one with the whole batch"
    test_processes.check(name, *two_processes[name])
    found('several processes', column)

@pytest.mark.parametrize('column', columns)
def test_data_parallel(column):
    "What can be said without two devices: layers that run in pieces are not read"
    row = 'DataParallel, two devices'
    learn = learner(nn.DataParallel(net()))
    learn.model.device_ids = [0,1]
    if column==columns[0]:
        found(row, column, '– not tried: it takes two GPUs')
        pytest.skip('needs two GPUs')
    cb = tasks['single-label images'].callback(column, net(8, s=1))
    with pytest.raises(ValueError, match='the student is a DataParallel over 2 devices') as e: learn.fit(1, cbs=cb)
    found(row, column, '✗ '+str(e.value).split('\n\t')[-1])

@pytest.mark.parametrize('column', columns)
def test_mps(column, tmp_path):
    if not torch.backends.mps.is_available():
        found('MPS', column, '– not tried: it takes an Apple GPU')
        pytest.skip('needs an Apple GPU')
    teacher,learn = net(8, s=1).to('mps'),learner(net().to('mps'), DataLoaders(*get_dls()).to('mps'))
    learn.fit(1, cbs=tasks['single-label images'].callback(column, teacher))
    assert left(learn, teacher)==[]
    found('MPS', column)

# ---- the table ----

matrix.found.columns,matrix.found.parts = columns,{
    'Tasks and teachers': list(tasks), 'Ways of training': list(ways),
    'More than one process or device': ['several processes','DataParallel, two devices','MPS']}

def test_the_page_says_so():
    "What the documentation shows is what was found just now; make matrix writes it"
    if '?' in str(matrix.found.tables()): pytest.skip('not every cell has run')
    if torch.backends.mps.is_available() or not hasattr(torch.compiler, 'set_stance'):
        pytest.skip('another kind of machine than the page')
    written = '\n'.join(matrix.found.written()).splitlines()
    assert matrix.page.read_text().splitlines()==written, 'nbs/works_with.md is not what was found: make matrix'
