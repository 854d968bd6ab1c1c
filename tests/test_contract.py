"""The promises every loss keeps (rule 5 of the house), each in a real Learner: a small convolutional student of a wider teacher, handwritten digits.
Every class under `fasterdistill.losses` is found by itself; one that needs arguments says so in its `example`. Nothing here names a loss."""
import importlib,inspect,pkgutil,re
from collections import namedtuple
from copy import deepcopy
from functools import lru_cache,partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (a method of Learner)
from fastai.data.core import Datasets
from fastai.learner import Learner,load_learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat
from sklearn.datasets import load_digits
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fasterdistill.loss,fasterdistill.losses,fasterdistill.networks.adapters
from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import DistillLoss,TaskLoss,ramp,steps
from fasterdistill.missing import MissingLabels
from fasterdistill.networks.net import Net

torch.set_num_threads(1)

# ---- every loss there is ----

modules = [importlib.import_module(o.name) for o in pkgutil.walk_packages(fasterdistill.losses.__path__, 'fasterdistill.losses.')]
losses = list(dict.fromkeys(o for m in modules for o in vars(m).values()   # an alias is the same class
    if inspect.isclass(o) and issubclass(o, DistillLoss) and o.__module__==m.__name__ and not o.__name__.startswith('_')))
class Three(DistillLoss):
    "Likenesses of items, which two do not have enough of: that a loss may ask for so many, and keep all promises"
    min_items = 3
    def forward(self, pred, teacher_pred):
        assert len(pred)>=3, 'a batch that is too small was handed over'
        s,t = (F.normalize(z-z.mean(0)) for z in (pred,teacher_pred))
        return (s@s.T-t@t.T).pow(2).mean()

each = pytest.mark.parametrize('cls', [*losses,Three], ids=lambda o: o.__name__)

def test_found():
    assert len(losses)>=5 and all(any(o.__module__==m.__name__ for o in losses) for m in modules)

# ---- a student, a teacher, data ----

digits = load_digits()
xs,ys = torch.tensor(digits.images/16, dtype=torch.float32)[:,None],torch.tensor(digits.target)
def image(i): return xs[i]
def label(i): return ys[i]
def labels(i): return torch.eye(10)[ys[i]]

def data(y=label, bs=16, n=37, n_valid=20):
    "Two batches of 16 and an odd one of 5"
    ds = Datasets(list(range(n+n_valid)), [[image],[y]], splits=[list(range(n)),list(range(n,n+n_valid))])
    return ds.dataloaders(bs=bs, val_bs=32, drop_last=False, num_workers=0, device='cpu')

def block(i, o, stride): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

class Small(nn.Module):
    "Three stages, of 8×8, 4×4 and 2×2"
    def __init__(self, w):
        super().__init__()
        self.layer1,self.layer2,self.layer3,self.fc = block(1, w, 1),block(w, 2*w, 2),block(2*w, 4*w, 2),nn.Linear(4*w, 10)
    def forward(self, x): return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2,3)))

@lru_cache
def trained(setting):
    "A teacher, trained for a few batches"
    torch.manual_seed(0)
    learn = Learner(data(setting.label, n=320), Small(setting.width), loss_func=setting.criterion())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn.model

Setting = namedtuple('Setting', 'criterion label width')
# A loss is put into the first of these that it does not refuse: one class of several; a teacher as wide as the student; yes or no for each class
settings = [Setting(CrossEntropyLossFlat, label, 6), Setting(CrossEntropyLossFlat, label, 4), Setting(BCEWithLogitsLossFlat, labels, 6)]

# ---- fits ----

class Watch(Callback):
    "What the parts and gradients were"
    order,run_valid = 6,False
    def __init__(self, loss): super().__init__(); self.loss,self.start,self.parts,self.grads,self.loss_grads,self.traces = loss,None,[],[],[],[]
    def before_batch(self):
        if self.start is None: self.start = {n: p.detach().clone() for n,p in self.loss.named_parameters()}
        self.traces.append(traces(self.model))
    def before_step(self):
        self.grads.append({n: None if p.grad is None else p.grad.clone() for n,p in self.model.named_parameters()})
        self.loss_grads.append({n: None if p.grad is None else p.grad.clone() for n,p in self.loss.named_parameters() if p.requires_grad})
        self.parts.append(self.kd.parts)

def plain_copy(o):
    if isinstance(o, torch.Tensor): return o.detach().clone()
    return {k: plain_copy(v) for k,v in o.items()} if isinstance(o, dict) else tuple(map(plain_copy, o)) if isinstance(o, tuple) else o

class Spy:
    "Reads, beside the loss, what it is given and what it returns"
    def __init__(self, loss):
        self.loss,self.built,self.calls = loss,None,[]
        build = loss.build
        def spying(**given): self.built = plain_copy(given); return build(**given)
        loss.build = spying
        self.handles = [loss.register_forward_hook(self.call, with_kwargs=True)]
    def call(self, loss, args, given, out): self.calls.append(SimpleNamespace(args=args, given=plain_copy(given), grads={n: _needs(v) for n,v in given.items()}, out=out.detach(), auto=torch.is_autocast_enabled('cpu'), state=deepcopy(loss.state_dict()), training=loss.training))
    def remove(self):
        del self.loss.build
        for h in self.handles: h.remove()

def _needs(v): return any(map(_needs, v.values())) if isinstance(v, dict) else isinstance(v, torch.Tensor) and v.requires_grad

_hooks = [k for k in vars(nn.Linear(1,1)) if 'hook' in k and isinstance(vars(nn.Linear(1,1))[k], dict)]
def traces(*models):
    "Hooks and attributes that a module of these kinds does not have by itself"
    own = {type(m): vars(m).keys() for m in [*Small(4).modules()]}
    return [(n,k) for model in models for n,m in model.named_modules() for k in [*(k for k in _hooks if vars(m)[k]), *(vars(m).keys()-own[type(m)])]]

def names(loss): return loss.reads.keys() | loss.build_reads.keys()
def make(cls, seed=2):
    torch.manual_seed(seed)
    student = Small(4)
    return cls.example(student, xs[:4]),student

def ready(cls, setting, expr=lambda l: 0*TaskLoss()+l, bs=16, cbs=(), label=None, **kw):
    "A Learner with the loss alone: the weight of the task loss is 0; `label` in the place of the setting's own"
    loss,student = make(cls)
    teacher = deepcopy(trained(setting)) if names(loss) & {'teacher_pred','fm_t','teacher'} else None
    kd = KnowledgeDistillationCallback(teacher, expr(loss))
    watch = Watch(loss)
    watch.kd = kd
    dls = data(label or setting.label, bs, **kw)
    learn = Learner(dls, student, loss_func=setting.criterion(), wd=0., cbs=[kd,watch,*cbs])
    return SimpleNamespace(learn=learn, kd=kd, loss=loss, student=student, teacher=teacher, watch=watch)

def fit(r, f='fit', n=1):
    with r.learn.no_bar(), r.learn.no_logging(): getattr(r.learn, f)(n, 1e-2)
    return r

@lru_cache
def fits(cls): return _first(cls)[0]
@lru_cache
def done(cls): return _first(cls)[1]

@lru_cache
def _first(cls):
    "The setting that suits the loss, and a fit of two epochs in it"
    refused = []
    for setting in settings:
        r = ready(cls, setting)
        r.keys,r.flags = list(r.student.state_dict()),None
        if r.teacher is not None:
            r.teacher.train(); r.teacher.layer2.eval(); r.teacher.fc.bias.requires_grad_(False)      # a user's own
            r.flags,r.weights = flags(r.teacher),deepcopy(r.teacher.state_dict())
        r.spy = Spy(r.loss)
        try: return setting,fit(r, n=2)
        except ValueError as e: refused.append(e)
        finally: r.spy.remove()
    raise refused[0]

def flags(m): return [o.training for o in m.modules()],[p.requires_grad for p in m.parameters()]
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def finite(gs): return all(g is None or g.isfinite().all() for g in gs.values())

# ---- the promises ----

@each
def test_finite_scalar(cls):
    "On every batch, the odd last one too"
    r = done(cls)
    own = [n for n in r.watch.parts[0] if n not in ('task_loss','agreement')]
    assert len(r.watch.parts)==6 and len(own)>=1
    for p in r.watch.parts: assert all(abs(p[n])<float('inf') for n in own), p
    sizes = [next(len(v) for v in (c.given.get('pred'), *c.given.get('fm_s', {}).values(), *c.given.get('xb', ())) if v is not None) for c in r.spy.calls if c.training and {'pred','fm_s','xb'}&c.given.keys()]
    assert not sizes or sizes==[16,16,5]*2
    for c in r.spy.calls: assert c.out.shape==() and c.out.dtype==torch.float32 and not c.args

@each
def test_gradient_reaches_the_student(cls):
    "Its first weights too, on every batch, from this loss alone"
    for g in done(cls).watch.grads:
        assert finite(g) and g['layer1.0.weight'] is not None and g['layer1.0.weight'].abs().max()>0

@each
def test_teacher_is_left_alone(cls):
    r = done(cls)
    for c in r.spy.calls: assert not c.grads.get('teacher_pred') and not c.grads.get('fm_t') and not c.grads.get('target')
    if r.teacher is None: return
    assert all(p.grad is None for p in r.teacher.parameters())
    assert same(r.teacher.state_dict(), r.weights) and flags(r.teacher)==r.flags
    assert not {id(p) for p in r.loss.parameters()} & {id(p) for p in r.teacher.parameters()}

@each
def test_learned_parts_move(cls):
    r = done(cls)
    now,learns = dict(r.loss.named_parameters()),{n for n,p in r.loss.named_parameters() if p.requires_grad}
    assert now.keys()==r.watch.start.keys()
    for g in r.watch.loss_grads:
        assert finite(g) and g.keys()==learns
    for n in learns:
        got = [g[n] for g in r.watch.loss_grads]
        assert any(g is not None for g in got), f'{n} never has a gradient'
        if now[n].ndim>1 or any(g is not None and g.abs().max()>0 for g in got): assert not torch.equal(now[n], r.watch.start[n]), f'{n} has not moved'
    for n in now.keys()-learns: assert torch.equal(now[n], r.watch.start[n])
    assert all(p.grad is None for p in now.values())

@each
def test_student_comes_out_plain(cls, tmp_path):
    "The same keys, in their order; an exported Learner loads, predicts the same and does not know of us"
    r = done(cls)
    assert list(r.student.state_dict())==r.keys and r.learn.model is r.student and type(r.student) is Small
    assert [id(p) for p,*_ in r.learn.opt.all_params()]==[id(p) for p in r.student.parameters()] and r.learn.opt.state.keys()<={*r.student.parameters()}
    learn = deepcopy(r.learn)
    learn.remove_cb(Watch)                                                       # ours, of the test
    learn.export(tmp_path/'student.pkl')
    assert b'fasterdistill' not in (tmp_path/'student.pkl').read_bytes()
    got = load_learner(tmp_path/'student.pkl').model
    assert same(got.state_dict(), r.student.state_dict()) and not traces(got)
    with torch.no_grad(): assert torch.equal(got.eval()(xs[:9]), deepcopy(r.student).eval()(xs[:9]))

@each
def test_nothing_stays(cls):
    "No hook, no replaced `forward`, no attribute after a fit; while it ran there were hooks where activations are read"
    r = done(cls)
    assert not traces(*filter(None, (r.student,r.teacher)))
    assert all(bool(t)==('fm_s' in names(r.loss)) for t in r.watch.traces)
    assert not r.loss.training and len(r.watch.traces)==6

class Boom(Callback):
    "Raises `e` on the second batch"
    run_valid = False
    def __init__(self, event, e, order): super().__init__(); self.e,self.order = e,order; setattr(self, event, self.go)
    def go(self):
        if self.iter==1: raise self.e

@each
@pytest.mark.parametrize('event,e,order', [('after_pred',KeyboardInterrupt(),0), ('after_loss',RuntimeError('in the middle'),7), ('before_step',RuntimeError('in the middle'),0)], ids=['after_pred','after_loss','before_step'])
def test_nothing_stays_after_an_exception(cls, event, e, order):
    boom = Boom(event, e, order)
    r = ready(cls, fits(cls), cbs=[boom])
    was = r.teacher is not None and flags(r.teacher)
    with pytest.raises(type(e)): fit(r)
    assert len(r.watch.traces)==2 and bool(r.watch.traces[1])==('fm_s' in names(r.loss))   # it was in the middle
    assert not traces(*filter(None, (r.student,r.teacher))) and not r.loss.training
    assert r.teacher is None or flags(r.teacher)==was and all(p.grad is None for p in r.teacher.parameters())
    assert [id(p) for p,*_ in r.learn.opt.all_params()]==[id(p) for p in r.student.parameters()]
    r.learn.remove_cb(boom)
    fit(r)
    assert finite(r.watch.grads[-1]) and not traces(*filter(None, (r.student,r.teacher)))

class Autocast(Callback):
    "`to_bf16` does nothing without a GPU: the same events, for this machine"
    order,run_valid = 10,False
    def before_batch(self): self.auto = torch.autocast('cpu', dtype=torch.bfloat16); self.auto.__enter__()
    def after_pred(self): self.was = self.pred.dtype; self.learn.pred = self.pred.float()
    def after_loss(self): self.auto.__exit__(None, None, None)
    def after_fit(self): assert self.was==torch.bfloat16, 'this was no autocast'

def double(o):
    if isinstance(o, torch.Tensor): return o.double() if o.is_floating_point() else o
    return {k: double(v) for k,v in o.items()} if isinstance(o, dict) else tuple(map(double, o)) if isinstance(o, tuple) else o

def by_hand(loss, given):
    "The value with everything random at one seed"
    torch.manual_seed(0)
    for g in (v for m in loss.modules() for v in vars(m).values() if isinstance(v, torch.Generator)): g.manual_seed(0)
    return loss(**given)

class Dtypes(TorchFunctionMode):
    "Notes the dtype of every tensor that a function of torch returns"
    def __init__(self): super().__init__(); self.seen = set()
    def __torch_function__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.seen |= {o.dtype for o in tree_leaves(out) if isinstance(o, torch.Tensor)}
        return out

@each
def test_autocast(cls):
    "The networks in half precision, the arithmetic of the loss and of its parts in float32: it agrees with float64 on what it was given"
    r = ready(cls, fits(cls), cbs=[Autocast()])
    spy,inner = Spy(r.loss),[]
    def note(m, _, out): inner.extend((type(m).__name__,o.dtype) for o in (out if isinstance(out, (tuple,list)) else [out]) if isinstance(o, torch.Tensor) and o.is_floating_point())
    fresh = r.loss.build
    def build(**given):
        fresh(**given)
        for m in r.loss.modules():
            if m is not r.loss: spy.handles.append(m.register_forward_hook(note))
    r.loss.build = build
    fit(r)
    spy.remove()
    calls = [c for c in spy.calls if c.training]
    assert len(calls)==3 and not any(c.auto for c in calls)
    assert {d for _,d in inner}<={torch.float32}, inner
    assert all(p.dtype==torch.float32 for p in r.loss.parameters()) and all(map(finite, r.watch.grads))
    for c in calls:
        assert c.out.dtype==torch.float32 and c.out.isfinite()
        for v in (c.given.get('pred'), c.given.get('teacher_pred'), *c.given.get('fm_s', {}).values(), *c.given.get('fm_t', {}).values()): assert v is None or v.dtype==torch.float32
    if {'student','teacher'} & r.loss.reads.keys(): return
    with Dtypes() as made: by_hand(deepcopy(r.loss), calls[-1].given)
    assert torch.float32 in made.seen and not made.seen & {torch.bfloat16,torch.float16}
    if {'task_loss','criterion'} & {n for n,need in r.loss.reads.items() if need}: return
    c,twin = calls[-1],deepcopy(r.loss).train()
    twin.load_state_dict(c.state)
    if by_hand(deepcopy(twin), c.given)!=c.out: return                          # it draws from the global generator: other numbers
    assert abs(by_hand(twin.double(), double(c.given))-c.out)<=1e-4*c.out.abs()

def own_parts(parts): return {n: v for n,v in parts.items() if n not in ('task_loss','agreement')}

@each
def test_fewest_items(cls):
    "Batches of as many items as it needs, at least of 2; a smaller last one goes without it"
    need = make(cls)[0].min_items
    n = max(need, 2)
    r = fit(ready(cls, fits(cls), bs=n, n=3*n+need-1))
    assert len(r.watch.grads)==len(r.watch.parts)==3+(need>1)
    for g,p in zip(r.watch.grads[:3], r.watch.parts):
        assert finite(g) and g['layer1.0.weight'] is not None and own_parts(p)
    for g,p in zip(r.watch.grads[3:], r.watch.parts[3:], strict=True): assert finite(g) and not own_parts(p)
    assert all(abs(v)<float('inf') for p in r.watch.parts for v in p.values())
    assert all(p.isfinite().all() for p in [*r.student.parameters(),*r.loss.parameters()])

@each
def test_too_small_batches_are_refused(cls):
    "Where no batch would have enough items, before anything is trained"
    need = make(cls)[0].min_items
    if need==1: return
    r = ready(cls, fits(cls), bs=need-1, n=3*need)
    was = deepcopy(r.student.state_dict())
    with pytest.raises(ValueError, match=f'at least {need} items, these have {need-1}: it would never be computed'): fit(r)
    assert same(r.student.state_dict(), was)

# ---- labels that are not there: -100 and NaN, as `MissingLabels` hands them on ----

def soft(i): return .8*labels(i)+.02
def gone(y): return torch.full_like(y, float('nan') if y.is_floating_point() else -100)
def some(label): return lambda i: gone(label(i)) if i%3 else label(i)
def none(label): return lambda i: gone(label(i))

def fit_with_gaps(cls, setting, gaps, label):
    "A fit in which labels miss, and what the loss was given and made of it"
    r = ready(cls, setting, cbs=[MissingLabels()], label=gaps(label))
    r.spy = Spy(r.loss)
    try: return fit(r)
    finally: r.spy.remove()

def check_gaps(r, every):
    "Finite values and gradients on all batches, items without a label among those that were given"
    calls = [c for c in r.spy.calls if c.training]
    assert len(calls)==len(r.watch.grads)==3
    for c,g,p in zip(calls, r.watch.grads, r.watch.parts, strict=True):
        assert c.out.shape==() and c.out.isfinite() and finite(g) and g['layer1.0.weight'] is not None
        assert all(abs(v)<float('inf') for v in own_parts(p).values()) and own_parts(p)
        if not every: assert g['layer1.0.weight'].abs().max()>0
    ys = [c.given['target'] for c in calls if c.given.get('target') is not None]
    if ys:                                                                       # it reads them, and got them as they are
        missing = torch.cat([y.isnan() if y.is_floating_point() else y==-100 for y in ys])
        assert missing.all() if every else missing.any() and not missing.all()
    for g in r.watch.loss_grads: assert finite(g)
    assert all(o.isfinite().all() for o in [*r.student.parameters(),*r.loss.state_dict().values()])

@each
@pytest.mark.parametrize('gaps', [some,none], ids=['some','all'])
def test_missing_labels(cls, gaps):
    "-100 where labels are classes, NaN where each class has its own: the teacher teaches all items"
    setting = fits(cls)
    check_gaps(fit_with_gaps(cls, setting, gaps, setting.label), gaps is none)

@each
@pytest.mark.parametrize('gaps', [some,none], ids=['some','all'])
def test_missing_soft_labels(cls, gaps):
    "NaN for the shares of classes; a loss that takes no soft labels says so with and without"
    setting = fits(cls)
    if setting.criterion is not CrossEntropyLossFlat: return
    setting = Setting(nn.CrossEntropyLoss, setting.label, setting.width)
    try: fit(ready(cls, setting, label=soft))
    except ValueError as e:
        with pytest.raises(ValueError, match=re.escape(str(e)[:40])): fit_with_gaps(cls, setting, gaps, soft)
        return
    check_gaps(fit_with_gaps(cls, setting, gaps, soft), gaps is none)

@each
def test_two_fits(cls):
    "The second goes on with the same learned parts"
    r = fit(ready(cls, fits(cls)))
    parts,values = {n: id(p) for n,p in r.loss.named_parameters()},{n: p.detach().clone() for n,p in r.loss.named_parameters()}
    n = len(r.watch.loss_grads)
    fit(r, 'fit_one_cycle')
    now = dict(r.loss.named_parameters())
    assert {n: id(p) for n,p in now.items()}==parts and len(r.watch.loss_grads)==2*n
    for k,p in now.items():
        if p.requires_grad and any(g[k] is not None and g[k].abs().max()>0 for g in r.watch.loss_grads[n:]): assert not torch.equal(p, values[k]), f'{k} has not moved'

scope = {k: v for m in (fasterdistill.loss,fasterdistill.networks.adapters,*modules) for k,v in vars(m).items() if not k.startswith('__')} | dict(partial=partial, Small=Small, Three=Three)

@each
def test_repr(cls):
    "It prints the expression back"
    loss,_ = make(cls)
    mine = scope | {type(o).__name__: o for o in [*loss._args[0],*loss._args[1].values()] if isinstance(o, nn.Module)}
    exprs = [loss, .1*TaskLoss()+2*loss, ramp(3)*(TaskLoss()+.5*loss), 3*(.1*loss+ramp(2)*(steps({0:1, 3:2})*loss))]
    if names(loss) & {'fm_s','fm_t'}: exprs += [loss.at('layer2'), loss.at(['layer2','layer3'], ['layer1','layer3'])]
    for o in exprs:
        assert repr(eval(repr(o), mine))==repr(o) and loss.__class__.__name__ in repr(o)
    assert repr(done(cls).loss)==repr(loss)                                      # and is not changed by a fit

@lru_cache
def nets(cls):
    "Copies of the two networks, for a loss that reads them"
    r = done(cls)
    return {n: deepcopy(m).eval() for n,m in (('student',r.student),('teacher',r.teacher)) if m is not None}

def given_to(cls):
    "What the loss and its `build` read in the fit, as plain tensors"
    def own(given): return {n: Net(nets(cls)[n], xs[:16], layers=v.layers) if n in ('student','teacher') and v else plain_copy(v) for n,v in given.items()}
    spy = done(cls).spy
    return own(next(c for c in spy.calls if c.training).given),own(spy.built or {})

@each
def test_by_hand(cls):
    "On tensors with keywords, no Learner about: finite, with gradients for what comes from the student; in the dtype it is given"
    given,built = given_to(cls)
    loss,_ = make(cls)
    loss.build(**built)
    loss.train()
    ins = [v.requires_grad_() for n in ('pred','fm_s') if given.get(n) is not None for v in (given[n].values() if isinstance(given[n], dict) else [given[n]])]
    v = by_hand(deepcopy(loss), given)
    assert v.shape==() and v.isfinite() and v.dtype==torch.float32
    if ins:
        gs = [g for g in torch.autograd.grad(v, ins, allow_unused=True) if g is not None]
        assert all(g.isfinite().all() for g in gs) and max(g.abs().max() for g in gs)>0
    if not {'student','teacher'} & names(loss): assert by_hand(deepcopy(loss).double(), double(plain_copy(given))).dtype==torch.float64

@each
def test_copies_and_checkpoints(cls):
    "A copy and a new loss with the saved state give the same value and share nothing"
    given,built = given_to(cls)
    loss = done(cls).loss
    want = by_hand(loss, given)
    twin,(fresh,_) = deepcopy(loss),make(cls, seed=5)
    assert repr(twin)==repr(loss) and by_hand(twin, given)==want
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in loss.parameters()}
    fresh.build(**built)
    fresh.eval()
    before = by_hand(fresh, given)
    assert not dict(loss.named_parameters()) or before!=want
    fresh.load_state_dict(loss.state_dict())
    assert by_hand(fresh, given)==want
