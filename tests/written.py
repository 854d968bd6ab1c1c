"""Distillation written into a Learner's loss function, by hooks and formulas of its own, as another opinion.
All else is fastai's work: mixing, accumulating, clipping, schedules, freezing."""
from functools import partial
from types import SimpleNamespace

import torch
from common import real
from torch import nn
from torch.utils._pytree import tree_leaves,tree_map_only

from fasterdistill.networks.net import Net

columns = 'the loss picked','FitNet','FCFD'              # loss omitted; TaskLoss()+FitNet(); TaskLoss()+FCFD()

# ---- formulas ----

def bernoulli(s, t, T=1.):
    "T²·KL(teacher‖student) of outputs that are a yes or no each"
    p,q = (t/T).sigmoid(),(s/T).sigmoid()
    return T*T*(p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()

def as_grid(tokens, like):
    "Tokens, the class token left out, as the map that they are compared with"
    return tokens if tokens.ndim==like.ndim else tokens[:,1:].transpose(1, 2).reshape(like.shape)

class Formula(nn.Module):
    "In the place of FCFD's own comparison of predictions, which here is not told the criterion"
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, pred, teacher_pred, target=None, criterion=None): return self.f(pred, teacher_pred, target)

# ---- what layers return ----

def layer(model, name):
    "The module, and which item of what it returns is meant (all of it: None)"
    name,_,item = name.removesuffix(']').partition('[')
    return model.get_submodule(name),int(item) if item.isdecimal() else item or None

def plain(x): return real(x.as_subclass(torch.Tensor))

class Layers:
    "What layers of a network returned last, while they are not `busy` with something else"
    def __init__(self, model, names): self.fm,self.busy,self.handles = {},False,[self.hook(model, n) for n in names]
    def hook(self, model, name):
        m,item = layer(model, name)
        def keep(m, args, out):
            if not self.busy: self.fm[name] = out if item is None else out[item]
        return m.register_forward_hook(keep)
    def __getitem__(self, name): return plain(self.fm[name])
    def remove(self):
        for h in self.handles: h.remove()

# ---- the loss function ----

class Written:
    """The Learner's loss function, that distils as well while training.
    `loss` holds the learned parts it starts with, `pairs` the layers of student and teacher"""
    def __init__(self, learn, task, column, teacher, loss, pairs, weight=None):
        self.base,self.learn,self.task,self.teacher,self.weight = learn.loss_func,learn,task,teacher.eval(),weight
        self.term = None if column==columns[0] else loss.losses[1]
        self.distil = dict(zip(columns, (self.soft,self.hints,self.mixed)))[column]
        if column==columns[2]: self.term.kd = Formula(partial(task.kd, T=4.))
        self.s,self.t = pairs
        self.maps = Layers(learn.model, self.s)
        self.begins = learn.model.register_forward_pre_hook(self.begin)
        self.xb = self.key = self.shape = None
    def begin(self, model, args):
        if self.maps.busy: return
        self.xb = tree_map_only(torch.Tensor, lambda x: x.as_subclass(torch.Tensor), args)
        self.maps.fm.clear()
    def remove(self):
        self.maps.remove()
        self.begins.remove()

    y_int = property(lambda self: getattr(self.base, 'y_int', False))
    reduction = property(lambda self: self.base.reduction, lambda self, v: setattr(self.base, 'reduction', v))
    def parameters(self): return [] if self.term is None else list(self.term.parameters())

    def __call__(self, pred, *yb):
        task,l = self.base(pred, *yb),self.learn
        if not l.training: return task
        if self.key!=(key := (l.epoch,l.iter,id(self.xb[0]))):          # MixUp asks twice for a batch
            self.maps.busy = True
            self.key,self.val = key,self.value(self.task.select(pred), yb)
            self.maps.busy = False
        if self.term is not None: return task+self.share(1.)*self.val
        return task+self.share(.5)*(self.val-task)
    def share(self, default): return self.weight(float(self.learn.pct_train)) if self.weight else default

    def value(self, pred, yb):
        "What the batch that just passed adds"
        theirs = Layers(self.teacher, self.t)
        torch.backends.mha.set_fastpath_enabled(False)                 # which hands nested tensors to hooks
        with torch.no_grad(): t = self.task.select(self.teacher(*self.xb))
        torch.backends.mha.set_fastpath_enabled(True)
        theirs.remove()
        amp = torch.is_autocast_enabled('cpu')
        batch = SimpleNamespace(s=plain(pred), t=plain(t), y=self.task.label(yb),
                                fs={n: self.maps[n] for n in self.s if n in self.maps.fm},      # that ran
                                ft={n: theirs[n] for n in self.t})
        with torch.autocast('cpu', enabled=False): return self.distil(batch, amp)
    def soft(self, b, amp): return self.task.kd(b.s, b.t, b.y)
    def hints(self, b, amp):
        layers = zip(self.term.adapters, self.s, self.t, strict=True)
        pairs = [(a(b.fs[s]),b.ft[t]) for a,s,t in layers if s in b.fs]
        return sum((s-as_grid(t, s)).pow(2).mean() for s,t in pairs)
    def mixed(self, b, amp):
        if len(b.fs)<len(self.s): return 0.
        l = self.learn
        student,teacher = self.networks(amp)
        return self.term(fm_s=b.fs, fm_t=b.ft, pred=b.s, teacher_pred=b.t, student=student, teacher=teacher,
                         epoch=l.epoch+l.iter/l.n_iter, xb=self.xb, target=b.y)
    def networks(self, amp):
        "Both, to be run again from their layers"
        if self.shape!=(shape := [x.shape[1:] for x in tree_leaves(self.xb)]):
            self.shape = shape
            both = (self.learn.model,self.s),(self.teacher,self.t)
            self.nets = [Net(m, self.xb, n, out=self.task.select) for m,n in both]
            assert not any(n.why_not(k) for n in self.nets for k in n.layers)
        if amp:
            for n in self.nets: n.at(n.passes.xb, partial(torch.autocast, 'cpu', torch.bfloat16))
        return self.nets
