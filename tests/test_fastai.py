"""What works with what in fastai: tasks and ways of training × the loss picked for the task, a feature loss with adapters, FCFD.
A cell is ✓ where a fit with the callback does what the same fit does whose losses are *written into the Learner's loss function*, by hooks and formulas of this file's own
(so that all else is fastai's work: mixing, accumulating, clipping, schedules, freezing); ✗ where it is refused before training, with the reason.
What a single fit computes and leaves alone, and every way out of it, is in test_callback.py; the table is printed at the end."""
import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from common import KD,At,X,Y,_block,assert_close,assert_same,get_dls,learner,left,lr,net,seed,state
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
import fastai.callback.hook # noqa: F401, gives the Learner its summary()
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import ModelResetter,RNNCallback
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
import test_processes
from test_callback import HalfCPU
from test_unlabelled import dls as unlabelled
from torch import nn
from transformers import ViTConfig,ViTForImageClassification

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.missing import MissingLabels
from fasterdistill.networks.net import Net
from fasterdistill.teachers.teacher import Frozen

torch.set_num_threads(1)
columns = 'the loss picked','FitNet','FCFD'                              # loss omitted; TaskLoss()+FitNet(); TaskLoss()+FCFD()
matrix = {}                                                            # {(row,column): '✓' or '✗ why'}, read by conftest.py

# ---- the other opinion ----

def kl(s, t, axis=1, T=4.):
    s,t = (o.movedim(axis, -1).flatten(0,-2)/T for o in (s,t))
    return T*T*(t.softmax(1)*(t.log_softmax(1)-s.log_softmax(1))).sum(1)
def bernoulli(s, t, T=1.): p,q = (t/T).sigmoid(),(s/T).sigmoid(); return T*T*(p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()

def layer(model, name): return model.get_submodule(name.split('[')[0]),(int(name[:-1].split('[')[1]) if '[' in name else None)

def grid_of(q, o): return q if q.ndim==o.ndim else q[:,1:].transpose(1, 2).reshape(o.shape)      # tokens, the class token left out

class Formula(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, pred, teacher_pred, target=None, criterion=None): return self.f(pred, teacher_pred, target)   # FCFD is not told the criterion here

class Written:
    "A Learner's loss function `base` that distils as well while training, by hooks of its own; `loss` holds the learned parts it starts with"
    def __init__(self, base, learn, task, column, teacher, loss, weight):
        self.base,self.learn,self.task,self.column,self.teacher,self.weight = base,learn,task,column,teacher.eval(),weight
        self.fm,self.xb,self.busy,self.key,self.shape = {},None,False,None,None
        self.term,self.handles = loss.losses[1] if column!=columns[0] else None,[]
        self.s,self.t = task.pairs(column)
        if column==columns[2]: self.term.kd = Formula(lambda s,t,y: task.kd(s, t, y, T=4.))
        def keep(name, item):
            def hook(m, a, o):
                if not self.busy: self.fm[name] = o if item is None else o[item]
            return hook
        def begin(m, a):
            if not self.busy: self.xb = tuple(x.as_subclass(torch.Tensor) for x in a)
        self.handles.append(learn.model.register_forward_pre_hook(begin))
        for n in self.s: m,i = layer(learn.model, n); self.handles.append(m.register_forward_hook(keep(n, i)))
    y_int = property(lambda self: getattr(self.base, 'y_int', False))
    reduction = property(lambda self: self.base.reduction, lambda self, v: setattr(self.base, 'reduction', v))
    def parameters(self): return [] if self.term is None else list(self.term.parameters())

    def __call__(self, pred, *yb):
        task,l = self.base(pred, *yb),self.learn
        if not l.training: return task
        if self.key!=(key := (l.epoch,l.iter,id(self.xb[0]))):          # MixUp asks twice for a batch
            self.busy = True
            self.key,self.val = key,self.value(self.task.select(pred), yb)
            self.busy = False
        w = self.weight(float(l.pct_train)) if self.weight else .5 if self.term is None else 1.
        return task+w*(self.val-task) if self.term is None else task+w*self.val

    def value(self, pred, yb):
        z,handles = {},[]
        for n in self.t:
            m,i = layer(self.teacher, n)
            handles.append(m.register_forward_hook(lambda m,a,o,n=n,i=i: z.update({n: o if i is None else o[i]})))
        with torch.no_grad(): t = self.task.select(self.teacher(*self.xb)).float()
        for h in handles: h.remove()
        amp = torch.is_autocast_enabled('cpu')
        s,fs,ft = pred.as_subclass(torch.Tensor).float(),{n: self.fm[n].as_subclass(torch.Tensor).float() for n in self.s},{n: z[n].float() for n in self.t}
        with torch.autocast('cpu', enabled=False):
            if self.term is None: return self.task.kd(s, t, yb[0])
            if self.column==columns[1]: return sum((o-grid_of(q, o)).pow(2).mean() for o,q in ((a(p),q) for a,p,q in zip(self.term.adapters, fs.values(), ft.values(), strict=True)))
            if self.shape!=self.xb[0].shape[1:]:
                self.shape,self.nets = self.xb[0].shape[1:],[Net(m, self.xb, n, out=self.task.select) for m,n in ((self.learn.model,self.s),(self.teacher,self.t))]
                assert not any(n.why_not(k) for n in self.nets for k in n.layers)
            if amp:
                for n in self.nets: n.now.around = partial(torch.autocast, 'cpu', torch.bfloat16)
            return self.term(fm_s=fs, fm_t=ft, pred=s, teacher_pred=t, student=self.nets[0], teacher=self.nets[1], epoch=self.learn.epoch+self.learn.iter/self.learn.n_iter, xb=self.xb, target=yb[0])

# ---- a row is a task and a way of training ----

class Task(SimpleNamespace):
    "`make(width, seed)` a network, `dls()`, `loss()`, what `kd` is by hand, and which layers the feature losses find or are told"
    found = ['layer1','layer2','layer3']
    told,cuts,output,lr = None,None,None,lr
    make = staticmethod(lambda w, s: net(w, s=s))
    taught = staticmethod(lambda t: t)                                  # the same teacher as the callback gets it
    loss = CrossEntropyLossFlat
    cbs = staticmethod(lambda: [])
    select = staticmethod(lambda o: o)
    def dls(self): return get_dls(shuffle=False)
    def kd(self, s, t, y, T=4.): return kl(s, t, T=T).mean()
    def pairs(self, column):
        if column==columns[0]: return [],[]
        if column==columns[1]: return self.told or (self.found[-1:],self.found[-1:])
        return (self.cuts or self.found,)*2
    def callback(self, column, teacher, weight=None):
        t = Frozen(teacher, output=self.output) if self.output is not None else teacher
        if column==columns[0]: return KD(t, output=self.output, **({} if weight is None else dict(weight=weight)))
        l,told = (FitNet(),self.told) if column==columns[1] else (FCFD(),self.cuts and [self.cuts])
        if told: l = l.at(*told)
        return KD(t, TaskLoss()+(l if weight is None else weight*l), output=self.output)

def fit(learn, cbs): learn.fit(2, cbs=cbs)

class Way(SimpleNamespace):
    "`run(learn, cbs)`, with what the Learner is made of; `other` says what differs for the other opinion, where the row should change nothing"
    run = staticmethod(fit)
    other,weight,splitter,tol,cut = None,None,None,1e-5,False
    make = staticmethod(lambda: {})
    student = teacher = staticmethod(lambda m: m)

def made(task, way, path):
    m = task.make(4, 0).train(); seed(2)
    learn = learner(way.student(m), way.dls() if 'dls' in vars(way) else task.dls(), loss_func=(way.loss if 'loss' in vars(way) else task.loss)(), metrics=[], path=path, cbs=task.cbs(), **way.make())
    if way.splitter: learn.splitter = way.splitter
    learn.lr = task.lr
    return learn

class Seen(Callback):
    "The loss whose gradient is taken, batch by batch, over several fits"
    order = 70
    def __init__(self): self.vals = []
    def before_backward(self): self.vals.append(self.learn.loss_grad.item())

def outcome(learn, res, seen): return dict(weights=state(learn.model), losses=seen.vals, valid=[v for o in learn.recorder.values for v in [*o][1:2] if isinstance(v, float)], res=res, rows=len(learn.recorder.losses))

def compare(task, column, path, way):
    teacher,ref = way.teacher(task.make(8, 1).train()),Way(**{**vars(way), **(way.other or {})})
    # with the callback
    learn,seen,built,given = made(task, way, path/'a'),Seen(),[],task.taught(teacher)
    asked = given.model if isinstance(given, Learner) else given
    had,was = left(learn, asked),state(asked)
    cb = task.callback(column, given, way.weight)
    start = At('after_pred', lambda l: l.training and not built and built.append(copy.deepcopy(cb.loss)))
    seed(3); res = way.run(learn, [cb,start,seen])
    assert left(learn, asked)==had and (cb.history or way.cut)
    assert_same(was, state(asked), 'the teacher')
    a = outcome(learn, res, seen)
    # written into the loss function
    learn,seen,teacher = made(task, ref, path/'b'),Seen(),ref.teacher(task.make(8, 1).train())
    own = Written(learn.loss_func, learn, task, column, teacher, built[0], way.weight)
    learn.loss_func = own
    split = learn.splitter
    def splitter(m):
        *groups,last = split(m) if way.splitter else [split(m)]
        return [*groups,[*last,*own.parameters()]]
    learn.splitter = splitter
    clip = At('before_step', lambda l: [nn.utils.clip_grad_norm_(own.parameters(), c.max_norm, c.norm_type) for c in l.cbs if isinstance(c, GradientClip) and own.parameters()], order=GradientClip.order+1)
    reset = At('before_train', lambda l: teacher.reset() if hasattr(teacher, 'reset') else None)
    seed(3); res = ref.run(learn, [clip,reset,seen])
    for h in own.handles: h.remove()
    b = outcome(learn, res, seen)
    # must be one
    assert len(a['losses'])==len(b['losses'])>1 and a['rows']==b['rows'] and a['res']==b['res']
    np.testing.assert_allclose(a['losses'], b['losses'], rtol=max(way.tol, 1e-4), atol=way.tol)
    np.testing.assert_allclose(a['valid'], b['valid'], rtol=max(way.tol, 1e-4), atol=way.tol)
    if not np.isnan(seen.vals).any():
        assert_close(a['weights'], b['weights'], way.tol)
        if own.term is not None: assert_close(state(cb.loss.losses[1]), state(own.term), way.tol)
    else: assert all(torch.allclose(p, b['weights'][k], equal_nan=True) for k,p in a['weights'].items())

# ---- tasks ----

def pairs(x, *ys, n=96, valid=64, bs=32):
    "fastai's loaders over tuples of tensors"
    seed()
    items = list(zip(x, *ys))
    return DataLoaders.from_dsets(items[:n], items[n:n+valid], bs=bs, device=torch.device('cpu'), shuffle=False, num_workers=0)

def images(y): return lambda: pairs([TensorImage(x) for x in X[:160]], y[:160])
several = torch.stack([Y%2==0, Y>4, (Y==2)|(Y==3)|(Y==5)|(Y==7)], 1).float()
grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)]*2, indexing='ij'))
points = torch.stack([(w[:,None]*grid).sum((2,3))/w.sum((1,2), keepdim=True)[:,0] for w in (X[:,0],X[:,0]**4)], 1)        # two centres of the ink, (B,2,2)

def unet(w, s): seed(s); return DynamicUnet(nn.Sequential(_block(1, w, 2, True),_block(w, 2*w, 2, True),_block(2*w, 4*w, 2, True)), 3, (32,32))
def masks():
    x = F.interpolate(X[:48], scale_factor=4)
    y = (x[:,0]>.3).long()+(x[:,0]>.8).long()
    y[:,:2] = y[:,-3:] = 255                                           # not labelled
    return pairs([TensorImage(o) for o in x], y, n=32, valid=16, bs=16)
def masked(s, t, y, T=4.): k = kl(s, t, T=T); return k[(y!=255).reshape(-1)].mean()

texts = [o.DESCR.lower().split() for o in (datasets.load_digits(),datasets.load_wine(),datasets.load_iris(),datasets.load_breast_cancer())]
words = ['xxunk','xxpad',*sorted({w for t in texts for w in t})]
tokens = [torch.tensor([words.index(w) for w in t]) for t in texts]
def snippets():
    g = torch.Generator().manual_seed(0)
    at = [(c, torch.randint(len(tokens[c])-24, (), generator=g).item()) for c in torch.randint(4, (160,), generator=g).tolist()]
    x = torch.stack([tokens[c][i:i+24] for c,i in at]); x[::3,18:] = 1   # some are shorter
    return pairs(x, torch.tensor([c for c,_ in at]))
def stream():
    seed()
    dl = lambda o: LMDataLoader(o, bs=4, seq_len=11, shuffle=False, device=torch.device('cpu'))
    return DataLoaders(dl([tokens[0][:300],tokens[1][:200]]), dl([tokens[2][:200]]))
still = lambda c, w: dict(c, emb_sz=2*w, n_hid=3*w, n_layers=2)
def classifier(w, s): seed(s); return get_text_classifier(AWD_LSTM, len(words), 4, seq_len=10, config=still(awd_lstm_clas_config, w), lin_ftrs=[3*w])
def language(w, s): seed(s); m = get_language_model(AWD_LSTM, len(words), config=still(awd_lstm_lm_config, w)); return sharp(m)
def sharp(m):
    "Large enough weights for what was read before to be seen in the prediction"
    with torch.no_grad():
        for p in m.parameters(): p.mul_(4)
    return m

def wines():
    "scikit-learn's: three columns in classes, one of them with gaps, four numbers, some missing"
    d = datasets.load_wine(as_frame=True).frame
    d = d.sample(frac=1, random_state=0).reset_index(drop=True)
    d.columns = [c.split('/')[0] for c in d.columns]
    for c in ('alcohol','hue','ash'): d[c] = pd.cut(d[c], 4, labels=list('abcd')).astype(str)
    d.loc[::7,'hue'] = None; d.loc[::11,'proline'] = float('nan')
    return d
cats,conts = ['alcohol','hue','ash'],['malic_acid','magnesium','flavanoids','proline']
def table(d=None, fill=FillMissing, step=1, splits=(range(128),range(128,178))):
    return TabularPandas(wines() if d is None else d, procs=[Categorify,fill,Normalize], cat_names=cats[::step], cont_names=conts[::step], y_names='target', y_block=CategoryBlock(), splits=[list(o) for o in splits])
def proc(to, cls): return next(p for p in to.procs if isinstance(p, cls))

def other_codes(t):
    "The tabular teacher as it would be, had it learned from other rows: more categories, columns the other way round, other means"
    d = pd.concat([wines().iloc[30:],wines().iloc[:9].assign(alcohol='aa', ash='bb')], ignore_index=True)
    a,b = table(),table(d, FillMissing(FillStrategy.constant, fill_vals=proc(table(), FillMissing).na_dict), -1, (range(20,len(d)),range(20)))
    m,(na,nb),code = copy.deepcopy(t),(proc(o, Normalize) for o in (a,b)),lambda to,n,c: list(to.classes[n]).index(c)
    ia,ic = [a.cat_names.index(n) for n in b.cat_names],[a.cont_names.index(n) for n in b.cont_names]
    start,dims = np.cumsum([0,*(e.embedding_dim for e in t.embeds)]),[e.embedding_dim for e in t.embeds]
    with torch.no_grad():
        for j,(n,i) in enumerate(zip(b.cat_names, ia)):
            m.embeds[j] = nn.Embedding(len(b.classes[n]), dims[i])
            for k,c in enumerate(b.classes[n]):
                if c in list(a.classes[n]): m.embeds[j].weight[k] = t.embeds[i].weight[code(a, n, c)]
        k,c = (torch.tensor([f(n) for n in b.cont_names], dtype=torch.float32) for f in (lambda n: nb.stds[n]/na.stds[n], lambda n: (nb.means[n]-na.means[n])/na.stds[n]))   # x = k*x'+c
        bn = m.bn_cont
        for v in (bn.weight,bn.bias,bn.running_mean,bn.running_var): v.copy_(v[ic].clone())
        bn.running_mean.sub_(c).div_(k); bn.running_var.add_(bn.eps).div_(k*k).sub_(bn.eps)
        lin = m.layers[0][0]
        lin.weight.copy_(lin.weight[:,[*(o for i in ia for o in range(start[i], start[i+1])),*(start[-1]+i for i in ic)]].clone())
    return Learner(b.dataloaders(bs=32, device=torch.device('cpu')), m, loss_func=CrossEntropyLossFlat())

def other_words(t):
    "The text teacher as it would be, had it numbered the words in another order"
    m,order = classifier(8, 1),[0,1,*reversed(range(2, len(words)))]
    m.load_state_dict(t.state_dict())
    with torch.no_grad(): m[0].module.encoder.weight.copy_(t[0].module.encoder.weight[order])
    dls = snippets(); dls.vocab = ([words[i] for i in order],list('abcd'))
    return Learner(dls, m, loss_func=CrossEntropyLossFlat(), cbs=rnn())
def named_snippets(): dls = snippets(); dls.vocab = (words,list('abcd')); return dls

def vit(w, s): seed(s); return ViTForImageClassification(ViTConfig(hidden_size=4*w, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8*w, image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))
blocks = [n for n,m in vit(4, 0).named_modules() if type(m).__name__=='ViTLayer']

def rows_and_columns():
    seed(); to = table()
    return to.dataloaders(bs=32, device=torch.device('cpu'), shuffle=False)
def tabular(w, s): to = table(); seed(s); return TabularModel(get_emb_sz(to), len(to.cont_names), 3, [4*w,2*w])

class Named(nn.Module):
    "Its prediction is one of several things in a dict"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): o = self.m(x); return dict(features=o.detach()*0, out=o)
class OfDict(nn.CrossEntropyLoss):
    def __init__(self, key='out'): super().__init__(); self.key = key
    def forward(self, pred, y): return super().forward(pred[self.key], y)

def torch_loaders():
    from torch.utils.data import DataLoader,TensorDataset
    return DataLoaders(DataLoader(TensorDataset(X[:96], Y[:96]), 32), DataLoader(TensorDataset(X[96:160], Y[96:160]), 32))

def first(o): return o[0] if isinstance(o, tuple) else o
rnn = lambda: [ModelResetter(),RNNCallback()]
tasks = {
    'single-label images': Task(),
    'multi-label images': Task(make=lambda w,s: net(w, 3, s=s), dls=images(several), loss=BCEWithLogitsLossFlat, kd=lambda s,t,y,T=1.: bernoulli(s, t, T)),
    'image regression (points)': Task(make=lambda w,s: net(w, 4, s=s), dls=images(points), loss=MSELossFlat, kd=lambda s,t,y,T=None: (s-t).pow(2).mean()),
    'segmentation (unet, ignore_index)': Task(make=unet, dls=masks, loss=partial(CrossEntropyLossFlat, axis=1, ignore_index=255), kd=masked, found=['layers.0.1','layers.3'], cuts=['layers.8','layers.9'], lr=.005),   # behind the last skip connection
    'text classification (AWD_LSTM)': Task(make=classifier, dls=snippets, cbs=rnn, select=first, told=(['1.layers.0'],['1.layers.0']), cuts=['1.layers.0.1','1.layers.0']),
    'language model (AWD_LSTM)': Task(make=language, dls=stream, cbs=rnn, select=first, told=(['0.rnns.1[0]'],['0.rnns.1[0]']), kd=lambda s,t,y,T=4.: kl(s, t, -1, T).mean(), cuts=['0.rnns.1[0]','1.decoder']),
    'tabular (two inputs)': Task(make=tabular, dls=rows_and_columns, told=(['layers.1'],['layers.1']), cuts=['layers.0','layers.1']),
    'a dict as output (output=)': Task(make=lambda w,s: Named(net(w, s=s)), loss=OfDict, select=lambda o: o['out'], output='out', found=['m.layer1','m.layer2','m.layer3']),
    'plain torch DataLoaders': Task(dls=torch_loaders),
    'a teacher with other table codes': Task(make=tabular, taught=other_codes, dls=rows_and_columns, told=(['layers.1'],['layers.1']), cuts=['layers.0','layers.1']),
    'a teacher with other word numbers': Task(make=classifier, taught=other_words, dls=named_snippets, cbs=rnn, select=first, told=(['1.layers.0'],['1.layers.0']), cuts=['1.layers.0.1','1.layers.0']),
    'Hugging Face networks (ViT)': Task(make=vit, loss=partial(OfDict, 'logits'), select=lambda o: o['logits'], output='logits', told=(blocks[-1:],blocks[-1:]), cuts=blocks, lr=.01),
}

@pytest.mark.parametrize('column', columns)
@pytest.mark.parametrize('name', tasks)
def test_task(name, column, tmp_path):
    task = tasks[name]
    compare(task, column, tmp_path, Way())
    matrix[name,column] = '✓'

# ---- ways of training ----

halves = lambda m: [list(m[:2].parameters()),list(m[2:].parameters())]
def each(*makers): return lambda learn, cbs: learn.fit(2, cbs=[*cbs,*(f() for f in makers)])
def fine_tune(learn, cbs): learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=cbs)
def on_the_learner(learn, cbs): learn.add_cbs(cbs); learn.fine_tune(2, 1e-2, freeze_epochs=1)
def lr_find(learn, cbs):
    "Changes nothing: the fit after it is the first"
    was = state(learn.model)
    learn.add_cbs(cbs); learn.lr_find(num_it=7, show_plot=False, stop_div=False)
    assert_same(was, state(learn.model))
    cbs[-1].vals.clear()                                               # those of lr_find
    seed(3); learn.fit(2)
def resized(learn, cbs):
    learn.fit(1, cbs=cbs)
    learn.dls = pairs([TensorImage(x) for x in F.interpolate(X[:160], size=(12,12), mode='bilinear')], Y[:160]); learn.fit(1, cbs=cbs)
def csv(learn, cbs):
    learn.path.mkdir(exist_ok=True)
    learn.fit(2, cbs=[*cbs,CSVLogger()])
    rows = [r.split(',') for r in (learn.path/'history.csv').read_text().split()]
    assert rows[0]==[*learn.recorder.metric_names] and [[float(o) for o in r[1:3]] for r in rows[1:]]==[[*o][:2] for o in learn.recorder.values]
    return len(rows)
def early(learn, cbs): learn.fit(5, cbs=[*cbs,EarlyStoppingCallback(min_delta=10.)]); return learn.epoch
def saved(learn, cbs, **kwargs):
    "The best by validation loss, which is the Learner's own, is loaded in the end; a rate that grows makes it worse"
    cb = SaveModelCallback(**kwargs)
    learn.fit(3, cbs=[*cbs,cb,ParamScheduler({'lr': SchedLin(.05, 1.5)})])
    best = int(np.argmin([o[1] for o in learn.recorder.values]))
    assert cb.best==learn.recorder.values[best][1]
    return best
def nan_images():
    x = X[:160].clone(); x[40] = float('nan')
    return pairs([TensorImage(o) for o in x], Y[:160])
def summary(learn, cbs):
    learn.add_cbs(cbs)
    text = '\n'.join(o for o in learn.summary().split('\n') if not o.lstrip().startswith('-') and 'Loss function' not in o)
    learn.fit(2)
    return text
class Scaled(MixedPrecision):
    "fastai's own scaling of the loss, on a CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', enabled=False),torch.amp.GradScaler('cpu', init_scale=2.**16),L()
accumulated = partial(GradientAccumulation, 64)
def compiled(m): m.compile(backend='aot_eager'); return m              # inductor itself is in test_compile.py
def twice(learn, cbs): learn.fit(1, cbs=cbs); learn.fit(1, cbs=cbs)
def nested(learn, cbs): learn.fit(2, cbs=[*cbs,At('after_batch', lambda l: l.training and l.validate(), skip=1)])
def resumed(learn, cbs):
    "Interrupted after an epoch; what is left is spoilt, and the fit goes on from the file"
    def stop(learn): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=[*cbs,Checkpoint('half'),At('after_epoch', stop, order=80)])
    kd = next(cb for cb in cbs if isinstance(cb, KD))
    with torch.no_grad():
        for p in [*learn.model.parameters(),*kd.loss.parameters()]: p.add_(1)
    seed(77); learn.fit(2, cbs=[*cbs,Checkpoint('half', resume=True)])
soft = .8*F.one_hot(Y, 10)+.2*F.one_hot((Y+1)%10, 10)
class Zero(nn.CrossEntropyLoss):
    "No task while training"
    def forward(self, pred, y): return 0*pred.sum() if pred.requires_grad else super().forward(pred, y)
ways = {
    'fit': Way(),
    'fit_one_cycle': Way(run=lambda l,cbs: l.fit_one_cycle(2, .05, cbs=cbs)),
    'fit_flat_cos': Way(run=lambda l,cbs: l.fit_flat_cos(2, .02, cbs=cbs)),
    'fine_tune (freeze, slices)': Way(run=on_the_learner, splitter=halves),
    'fine_tune(cbs=…)': Way(run=fine_tune, splitter=halves),
    'lr_find': Way(run=lr_find, other=dict(run=fit)),
    'GradientAccumulation': Way(run=each(accumulated), dls=lambda: get_dls(128, shuffle=False)),
    'GradientClip': Way(run=each(lambda: GradientClip(.1))),
    'mixed precision (bf16, CPU)': Way(run=each(HalfCPU), tol=2e-3),
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
    'TerminateOnNaNCallback': Way(run=lambda l,cbs: l.fit(2, cbs=[*cbs,TerminateOnNaNCallback()]), dls=nan_images, cut=True),
    'OptimWrapper(torch SGD)': Way(make=lambda: dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9)))),
    'OptimWrapper(torch AdamW)': Way(make=lambda: dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, eps=1e-3))), run=lambda l,cbs: l.fit(2, 1e-2, cbs=cbs)),
    'ParamScheduler, discriminative': Way(run=lambda l,cbs: l.fit(2, slice(1e-3,5e-2), cbs=[*cbs,ParamScheduler({'lr': SchedCos(np.array([1e-3,5e-2]), np.array([1e-4,1e-2]))})]), splitter=halves),
    'weight as a fastai schedule': Way(weight=SchedCos(1., .2)),
    'summary()': Way(run=summary),
    'soft labels': Way(dls=images(soft.float()), loss=nn.CrossEntropyLoss),
    'data without labels': Way(dls=unlabelled, loss=nn.CrossEntropyLoss, other=dict(dls=partial(unlabelled, labels=True), loss=Zero)),
    'some labels missing': Way(run=each(MissingLabels), dls=images(torch.where(torch.arange(len(Y))%3>0, Y, -100)), loss=nn.CrossEntropyLoss, other=dict(run=fit)),   # which torch's own leaves out
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
    if 'compiled' in name and column!=columns[0] and not hasattr(torch.compiler, 'set_stance'):          # test_compile.py holds the words
        with pytest.raises(ValueError, match='can be read inside from torch 2.6 on'): compare(tasks['single-label images'], column, tmp_path, ways[name])
        matrix[name,column] = '✗ from torch 2.6 on'; return
    compare(tasks['single-label images'], column, tmp_path, ways[name])
    matrix[name,column] = '✓'

# ---- more than one process or device ----

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory): return test_processes.two(tmp_path_factory.mktemp('two'), ['soft_target','fitnet','fcfd'])

@pytest.mark.parametrize('column,name', zip(columns, ['soft_target','fitnet','fcfd']))
def test_two_processes(two_processes, column, name):
    "As one with the whole batch, to 1e-5"
    test_processes.check(name, *two_processes[name])
    matrix['several processes',column] = '✓'

@pytest.mark.parametrize('column', columns)
def test_data_parallel(column):
    "What can be said without two devices: layers that run in pieces are not read"
    task = tasks['single-label images']
    learn = learner(nn.DataParallel(net()))
    learn.model.device_ids = [0,1]
    if column==columns[0]: matrix['DataParallel, two devices',column] = '– not tried: it takes two GPUs'; pytest.skip('needs two GPUs')
    with pytest.raises(ValueError, match='the student is a DataParallel over 2 devices') as e: learn.fit(1, cbs=task.callback(column, net(8, s=1)))
    matrix['DataParallel, two devices',column] = '✗ '+str(e.value).split('\n\t')[-1]

@pytest.mark.parametrize('column', columns)
def test_mps(column, tmp_path):
    if not torch.backends.mps.is_available(): matrix['MPS',column] = '– not tried: it takes an Apple GPU'; pytest.skip('needs an Apple GPU')
    teacher,learn = net(8, s=1).to('mps'),learner(net().to('mps'), DataLoaders(*get_dls()).to('mps'))
    learn.fit(1, cbs=tasks['single-label images'].callback(column, teacher))
    assert left(learn, teacher)==[]
    matrix['MPS',column] = '✓'

# ---- the table ----

devices = ['several processes','DataParallel, two devices','MPS']
parts = {'Tasks and teachers': tasks, 'Ways of training': ways, 'More than one process or device': devices}
page = Path(__file__).parents[1]/'nbs'/'works_with.md'

def cells():
    "The matrix with its ✗ and – numbered, and what the numbers mean; a cell that did not run or did not hold is '?'"
    why = []
    def cell(o):
        if o[:1] not in '✗–': return o
        if o not in why: why.append(o)
        return f'{o[0]} {why.index(o)+1}'
    return {t: {n: [cell(matrix.get((n,c), '?')) for c in columns] for n in names} for t,names in parts.items()},[o[2:] for o in why]

def shown():
    "As lines of text"
    tables,why = cells()
    wide = max(len(n) for t in tables.values() for n in t)
    def line(first, cells): return first.ljust(wide)+'  '+'  '.join(c.ljust(len(h)) for c,h in zip(cells, columns)).rstrip()
    for title,rows in tables.items():
        yield ''; yield line(title, columns)
        for n,r in rows.items(): yield line(n, r)
    yield ''
    for i,o in enumerate(why): yield f'{i+1}: {o}'

def written():
    "As the page of the documentation"
    tables,why = cells()
    yield '# What works with what\n\n> Every ✓ is a fit that was compared with the same fit written by hand.\n'
    yield ('Written by `make matrix` from what `tests/test_fastai.py` found. A cell is ✓ where a real, small Learner with the callback trains to the weights and losses of one whose loss function holds the distillation, '
           'written out with hooks and formulas of the test\'s own. The columns are the loss that is picked for the task (`KnowledgeDistillationCallback(teacher)`), a feature loss with learned adapters (`TaskLoss()+FitNet()`), '
           'and one that runs parts of both networks again (`TaskLoss()+FCFD()`). ✗ is refused before anything is trained; – was not tried; the reasons are below.\n')
    for title,rows in tables.items():
        yield f'## {title}\n'
        yield '| | '+' | '.join(columns)+' |'; yield '|---|'+':-:|'*len(columns)
        for n,r in rows.items(): yield f'| {n} | '+' | '.join(r)+' |'
        yield ''
    for i,o in enumerate(why): yield f'{i+1}. {o}'

def test_the_page_says_so():
    "What the documentation shows is what was found just now; make matrix writes it"
    if '?' in str(cells()) or torch.backends.mps.is_available() or not hasattr(torch.compiler, 'set_stance'): pytest.skip('not every cell has run, or on another kind of machine than the page')
    assert page.read_text().splitlines()=='\n'.join(written()).splitlines(), 'nbs/works_with.md is not what was found: make matrix'
