"Small real Learners on scikit-learn's 8×8 digits, and what has to hold after every fit"
import random
from collections import OrderedDict
from functools import partial

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize,ItemGetter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from fastcore.basics import noop
from sklearn.datasets import load_digits
from torch import nn

from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import DistillLoss
from fasterdistill.missing import MissingLabels

_d = load_digits()
X,Y = torch.tensor(_d.images/16, dtype=torch.float32)[:,None],torch.tensor(_d.target)
KD,lr = KnowledgeDistillationCallback,.05

def seed(n=0): torch.manual_seed(n); np.random.seed(n); random.seed(n)

def _block(i, o, stride, bn): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o) if bn else nn.Identity(), nn.ReLU(inplace=True))

def net(w=4, classes=10, bn=True, s=0):
    "Three stages of torch's own modules, so that it unpickles anywhere"
    seed(s)
    return nn.Sequential(OrderedDict(layer1=_block(1, w, 1, bn), layer2=_block(w, 2*w, 2, bn), layer3=_block(2*w, 4*w, 2, bn), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4*w, classes)))

def get_dls(n=96, valid=64, bs=32, shuffle=True, vocab=range(10), after_batch=None, label=int, drop_last=True):
    "Digits of which `label` is the class"
    seed()
    items = [(TensorImage(x),label(y)) for x,y in zip(X[:n+valid], Y[:n+valid].tolist())]
    dsets = Datasets(items, [[ItemGetter(0)],[ItemGetter(1),Categorize(vocab=list(vocab), sort=False)]], splits=[range(n),range(n, n+valid)])
    return dsets.dataloaders(bs=bs, val_bs=32, shuffle=shuffle, drop_last=drop_last, num_workers=0, device=torch.device('cpu'), after_batch=after_batch)

def learner(model=None, dls=None, loss_func=None, opt_func=partial(SGD, mom=.9), metrics=accuracy, bar=False, **kwargs):
    model = net() if model is None else model
    learn = Learner(get_dls() if dls is None else dls, model, loss_func=loss_func or CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, metrics=metrics, **kwargs)
    if not bar: learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress']); learn.logger = noop
    return learn

def state(m): return {k: v.clone() for k,v in m.state_dict().items()}

def assert_same(a, b, what=''):
    "Equal to the last bit"
    assert a.keys()==b.keys()
    for k in a: assert torch.equal(a[k], b[k]), f'{what} {k} differs by {(a[k]-b[k]).abs().max()}'

def assert_close(a, b, tol=1e-6):
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=tol*max(1, b[k].abs().max().item()), msg=lambda m: f'{k}: {m}')

_hooks = '_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks','_forward_hooks_with_kwargs','_forward_hooks_always_called','_forward_pre_hooks_with_kwargs'

def left(learn, *teachers):
    "What a fit has left behind that does not belong there; empty after every fit"
    res = []
    for m in (learn.model,*teachers):
        for n,o in m.named_modules(): res += [(n,k) for k in _hooks if getattr(o, k, None)] + [(n,'forward')]*('forward' in vars(o))
    if learn.opt is not None:
        mine = [id(p) for p in learn.model.parameters()]
        if sorted(id(p) for pg in learn.opt.param_lists for p in pg)!=sorted(mine): res.append('optimizer')
        for opt in [learn.opt]+([learn.opt.opt] if hasattr(learn.opt, 'opt') else []): res += ['optimizer state']*bool({id(p) for p in opt.state if isinstance(p, torch.Tensor)}-set(mine))
    res += [f'metric {m.name}' for m in learn.metrics if m.name!='accuracy']
    res += [cb.name for cb in learn.cbs if type(cb).__module__.startswith('fasterdistill') and not isinstance(cb, (KD,MissingLabels))]
    res += ['get_idxs']*('get_idxs' in vars(learn.dls.train))
    for t in teachers: res += ['teacher flags']*(not all(p.requires_grad for p in t.parameters())) + ['teacher mode']*(not all(m.training for m in t.modules())) + ['teacher gradients']*any(p.grad is not None for p in t.parameters())
    return res

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

class Watch(DistillLoss):
    "Hands all it reads to `f` and adds nothing"
    layers = 'stages'
    def __init__(self, f=lambda **k: None): self.f = f
    def forward(self, pred, teacher_pred, fm_s, fm_t, xb, target):
        self.f(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, xb=xb, target=target)
        return 0*(pred.detach().sum()+teacher_pred.sum()+sum(o.detach().sum() for o in [*fm_s.values(),*fm_t.values()]))
