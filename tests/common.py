"Small real Learners on scikit-learn's 8×8 digits, what fits are compared with, and what must hold after every fit"
import copy
import random
import sys
from collections import OrderedDict
from contextlib import ExitStack,contextmanager
from functools import partial
from importlib.metadata import version
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fastai import torch_core
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.rnn import ModelResetter,RNNCallback
from fastai.data.core import DataLoaders,Datasets
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize,ItemGetter
from fastai.learner import Learner
from fastai.losses import BaseLoss,CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastcore.basics import noop
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._pytree import tree_map_only

from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import DistillLoss
from fasterdistill.missing import MissingLabels

torch.set_num_threads(1)               # for processes that import this file too; conftest.py does it for pytest's
KD,lr = KnowledgeDistillationCallback,.05
cpu = torch.device('cpu')

def seed(n=0):
    torch.manual_seed(n)
    np.random.seed(n)
    random.seed(n)

# ---- float32, float64 ----

in_float64 = pytest.mark.usefixtures('float64')      # for weights after steps taken in two ways: see conftest.py

_tensor = torch_core.tensor

def _keeping_tensor(x, *rest, **kwargs):
    "fastai's own, which makes float32 of float64, without that"
    return x if isinstance(x, torch.Tensor) and not rest else real(_tensor(x, *rest, **kwargs))

_call = BaseLoss.__call__

def _keeping_call(self, pred, y, **kwargs):
    "A loss of fastai's, some of which make float32 of the labels, without that"
    kept = copy.copy(self)
    kept.floatify = False
    return _call(kept, pred, y.to(pred.dtype) if self.floatify else y, **kwargs)

@contextmanager
def floating(dtype):
    "Networks, data, losses and learned parts that are made inside are of `dtype`, those of fastai too"
    was = torch.get_default_dtype()
    users = [m for n,m in sys.modules.items() if n.startswith('fastai.') and vars(m).get('tensor') is _tensor]
    torch.set_default_dtype(dtype)
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, was)
        if dtype==torch.float64:
            for m in users: stack.enter_context(patch.object(m, 'tensor', _keeping_tensor))
            stack.enter_context(patch.object(BaseLoss, '__call__', _keeping_call))
        yield

def real(x):
    "Floating-point numbers in the type that `floating` says"
    return x.to(torch.get_default_dtype()) if x.is_floating_point() else x

def one_rounding(x, dtype=torch.bfloat16):
    "`x`, every number moved up or down by as much as rounding it to `dtype` can move it"
    up = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0))*2-1
    return x*(1+up*torch.finfo(dtype).eps/2)

# ---- data ----

_digits = load_digits()
X,Y = torch.tensor(_digits.images/16, dtype=torch.float32)[:,None],torch.tensor(_digits.target)

def get_dls(n=96, valid=64, bs=32, shuffle=True, vocab=range(10), after_batch=None, label=int, drop_last=True):
    "Digits of which `label` is the class"
    seed()
    items = [(TensorImage(x),label(y)) for x,y in zip(real(X[:n+valid]), Y.tolist())]
    pipelines = [[ItemGetter(0)],[ItemGetter(1),Categorize(vocab=list(vocab), sort=False)]]
    dsets = Datasets(items, pipelines, splits=[range(n),range(n, n+valid)])
    return dsets.dataloaders(bs=bs, val_bs=32, shuffle=shuffle, drop_last=drop_last, num_workers=0,
                             device=cpu, after_batch=after_batch)

def tuples(*columns, n=96, valid=64, bs=32, shuffle=False, drop_last=False):
    "fastai's loaders over tuples of what the columns hold, in their order: `n` items to train with, then `valid`"
    seed()
    items = list(zip(*columns))
    return DataLoaders.from_dsets(items[:n], items[n:n+valid], bs=bs, shuffle=shuffle, drop_last=drop_last,
                                  num_workers=0, device=cpu)

def unlabelled(labels=False, valid=True, bs=32):
    "Digits to train with, of which nothing is known (or the labels are), and digits to validate with labels (or none)"
    def load(at, known):
        items = zip(real(X[at]), Y[at]) if known else zip(real(X[at]))
        return DataLoader(list(items), bs=bs, num_workers=0, device=cpu)
    res = DataLoaders(load(slice(0, 96), labels), load(slice(96, 160), valid))
    res.n_inp = 1
    return res

class Real(Callback):
    "Batches in the type that `floating` says, whatever their loader makes"
    order = -9
    def before_batch(self):
        self.learn.xb,self.learn.yb = (tree_map_only(torch.Tensor, real, tuple(o)) for o in (self.xb,self.yb))

class Rounded(Callback):
    "Inputs off by as much as bfloat16 rounds them"
    order = Real.order+1
    def before_batch(self): self.learn.xb = tuple(map(one_rounding, self.xb))

# ---- networks ----

def _block(i, o, stride, bn):
    norm = nn.BatchNorm2d(o) if bn else nn.Identity()
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), norm, nn.ReLU(inplace=True))

def net(w=4, classes=10, bn=True, s=0):
    "Three stages of torch's own modules, so that it unpickles anywhere"
    seed(s)
    return nn.Sequential(OrderedDict(
        layer1=_block(1, w, 1, bn), layer2=_block(w, 2*w, 2, bn), layer3=_block(2*w, 4*w, 2, bn),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4*w, classes)))

class ViT(nn.Module):
    "Pictures of 8×8 cut into 4×4 patches, a class token or the mean of all, four blocks, of torch's own modules"
    def __init__(self, d=16, s=5, cls=True):
        super().__init__()
        seed(s)
        self.patch = nn.Conv2d(1, d, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, d)) if cls else None
        self.pos = nn.Parameter(torch.randn(1, 16+cls, d))
        self.blocks = nn.Sequential(*[attention(d) for _ in range(4)])
        self.norm,self.fc = nn.LayerNorm(d),nn.Linear(d, 10)
    def tokens(self, x):
        "What goes into the blocks"
        z = self.patch(x).flatten(2).mT
        if self.cls is not None: z = torch.cat([self.cls.expand(len(z), -1, -1), z], 1)
        return z+self.pos
    def feature(self, x):
        "What goes into the classifier"
        z = self.norm(self.blocks(self.tokens(x)))
        return z.mean(1) if self.cls is None else z[:,0]
    def forward(self, x): return self.fc(self.feature(x))

def attention(d): return nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True, norm_first=True)

def hf_vit(width=16, s=0, **config):
    "Hugging Face's, which answers with a dict"
    from transformers import ViTConfig,ViTForImageClassification
    seed(s)
    return ViTForImageClassification(ViTConfig(
        hidden_size=width, num_hidden_layers=3, num_attention_heads=2, intermediate_size=2*width,
        image_size=8, patch_size=2, num_channels=1, num_labels=10, **config))

exports = hasattr(torch.compiler, 'set_stance')          # torch 2.4 cannot follow a network that was cut off
hf_old = int(version('transformers').partition('.')[0])<5
def hf_block(path):
    "The activation of a block: transformers 4 returns it in a tuple"
    return f'{path}[0]' if hf_old else path

def lstm(w): return dict(emb_sz=2*w, n_hid=3*w, n_layers=2)

class Out(nn.Module):
    "`f` of what a network answers"
    def __init__(self, m, f):
        super().__init__()
        self.m,self.f = m,f
    def forward(self, x): return self.f(self.m(x))

def loud(m, k=3):
    "Large enough weights for every input to be seen in the prediction"
    with torch.no_grad():
        for p in m.parameters(): p.mul_(k)
    return m

def asked(model, *args, **kwargs):
    "What a copy of the network answers in evaluation"
    m = copy.deepcopy(model).eval()
    with torch.no_grad(): return m(*args, **kwargs)

# ---- Learners ----

def rnn():
    "What fastai's recurrent networks need"
    return [ModelResetter(),RNNCallback()]

def learner(model=None, dls=None, loss_func=None, opt_func=partial(SGD, mom=.9), metrics=accuracy, bar=False,
            **kwargs):
    model = net() if model is None else model
    learn = Learner(get_dls() if dls is None else dls, model, loss_func=loss_func or CrossEntropyLossFlat(),
                    opt_func=opt_func, lr=lr, metrics=metrics, **kwargs)
    if not bar:
        learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
        learn.logger = noop
    return learn

class At(Callback):
    "Call `f(learn)` at an event: every time, or once after `skip` times"
    run_valid = True
    def __init__(self, event, f, order=70, skip=None): self.order,self.event,self.f,self.skip = order,event,f,skip
    def __call__(self, event_name):
        super().__call__(event_name)
        if event_name!=self.event: return
        if self.skip is not None: self.skip -= 1
        if self.skip in (None,-1): self.f(self.learn)
    def __reduce__(self): return Callback,()

def raising(error):
    "A function of anything that raises `error`"
    def f(*args, **kwargs): raise error
    return f

class StepLosses(Callback):
    "The loss whose gradient is taken, batch by batch, over all fits"
    order = 70
    def __init__(self): self.vals = []
    def before_backward(self): self.vals.append(self.learn.loss_grad.item())

class HalfCPU(Callback):
    "bfloat16 on a CPU, where fastai's MixedPrecision does nothing; `lift=False` leaves predictions in it"
    order = MixedPrecision.order
    def __init__(self, lift=True): self.lift,self.kinds = lift,set()
    def before_batch(self):
        self.amp = torch.autocast('cpu', dtype=torch.bfloat16)
        self.amp.__enter__()
    def after_pred(self):
        self.kinds.add(self.pred.dtype)
        if self.lift: self.learn.pred = self.pred.float()
    def after_loss(self): self.amp.__exit__(None, None, None)
    def after_fit(self):
        assert not torch.is_autocast_enabled('cpu')
        assert self.kinds=={torch.bfloat16}, 'this was no autocast'

class Watch(DistillLoss):
    "Hands all it reads to `f` and adds nothing"
    layers = 'stages'
    def __init__(self, f=lambda **k: None): self.f = f
    def forward(self, pred, teacher_pred, fm_s, fm_t, xb, target):
        self.f(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, xb=xb, target=target)
        maps = sum(o.detach().sum() for o in [*fm_s.values(),*fm_t.values()])
        return 0*(pred.detach().sum()+teacher_pred.sum()+maps)

# ---- the other opinion ----

def kl_each(s, t, T=4., axis=1):
    "Hinton's loss by its formula, a value for each row of classes: T²·KL(teacher‖student)"
    s,t = (o.movedim(axis, -1).flatten(0, -2)/T for o in (s,t))
    return T*T*(t.softmax(1)*(t.log_softmax(1)-s.log_softmax(1))).sum(1)

def kl(s, t, T=4.): return kl_each(s, t, T).mean()

# ---- what must hold ----

def state(m): return {k: v.clone() for k,v in m.state_dict().items()}

def assert_same(a, b, what=''):
    "Equal to the last bit"
    assert a.keys()==b.keys()
    for k in a: assert torch.equal(a[k], b[k]), f'{what} {k} differs by {(a[k]-b[k]).abs().max()}'

def assert_close(a, b, tol=None):
    "Each tensor to `tol` of its largest number, or of 1: 1e-10 in float64 (see `floating`), 1e-6 in float32"
    assert a.keys()==b.keys()
    for k in a:
        atol = tol or (1e-10 if b[k].dtype==torch.float64 else 1e-6)
        atol *= max(1, b[k].abs().max().item())
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=atol, msg=lambda m: f'{k}: {m}')

def furthest(a, b):
    "The largest difference of two dicts of tensors"
    assert a.keys()==b.keys()
    return max([(a[k]-b[k]).abs().max().item() for k in a], default=0.)

def flags(m):
    "Which parameters of a network require gradients, which of its modules train"
    return [p.requires_grad for p in m.parameters()],[o.training for o in m.modules()]

_hooks = ('_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks',
          '_forward_hooks_with_kwargs','_forward_hooks_always_called','_forward_pre_hooks_with_kwargs')

def hooked(model):
    "Where a network still has hooks or a patched `forward`"
    for n,o in model.named_modules():
        yield from ((n,k) for k in _hooks if getattr(o, k, None))
        if 'forward' in vars(o): yield n,'forward'

def _in_optimizer(learn):
    mine = [id(p) for p in learn.model.parameters()]
    if sorted(id(p) for pg in learn.opt.param_lists for p in pg)!=sorted(mine): yield 'optimizer'
    for opt in filter(None, (learn.opt,getattr(learn.opt, 'opt', None))):
        if {id(p) for p in opt.state if isinstance(p, torch.Tensor)}-set(mine): yield 'optimizer state'

def _of_teacher(t):
    trainable,training = flags(t)
    if not all(trainable): yield 'teacher flags'
    if not all(training): yield 'teacher mode'
    if any(p.grad is not None for p in t.parameters()): yield 'teacher gradients'

def left(learn, *teachers):
    "What a fit has left behind that does not belong there; empty after every fit"
    res = [o for m in (learn.model,*teachers) for o in hooked(m)]
    if learn.opt is not None: res += _in_optimizer(learn)
    res += [f'metric {m.name}' for m in learn.metrics if m.name!='accuracy']
    ours = [cb for cb in learn.cbs if type(cb).__module__.startswith('fasterdistill')]
    res += [cb.name for cb in ours if not isinstance(cb, (KD,MissingLabels))]
    if 'get_idxs' in vars(learn.dls.train): res.append('get_idxs')
    for t in teachers: res += _of_teacher(t)
    return res

def refuses(learn, match, *cbs, teachers=(), error=ValueError):
    "A fit ends with this error before anything is trained, and leaves nothing"
    was,had = state(learn.model),left(learn, *teachers)
    with pytest.raises(error, match=match): learn.fit(1, cbs=list(cbs))
    assert_same(state(learn.model), was)
    assert left(learn, *teachers)==had
