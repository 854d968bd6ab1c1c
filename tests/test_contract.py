"""The promises every loss keeps (rule 5 of the house), each in a real Learner: a small convolutional student of a
wider teacher, handwritten digits. Every class under `fasterdistill.losses` is found by itself; one that needs
arguments says so in its `example`. Nothing here names a loss."""
import importlib
import inspect
import pkgutil
import re
from collections import namedtuple
from copy import deepcopy
from functools import lru_cache,partial
from types import SimpleNamespace

import pytest
import torch
from common import HalfCPU,X,Y,flags,net
from fastai.callback.core import Callback
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (a method of Learner)
from fastai.callback.training import GradientClip
from fastai.data.core import Datasets
from fastai.learner import Learner,load_learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fasterdistill.loss
import fasterdistill.losses
import fasterdistill.networks.adapters
from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import DistillLoss,TaskLoss,ramp,steps
from fasterdistill.missing import MissingLabels
from fasterdistill.networks.net import Net

# ---- every loss there is ----

packages = pkgutil.walk_packages(fasterdistill.losses.__path__, 'fasterdistill.losses.')
modules = [importlib.import_module(o.name) for o in packages]

def losses_of(module):
    "Those defined there, under their own names: an alias is the same class"
    for o in vars(module).values():
        if not inspect.isclass(o) or not issubclass(o, DistillLoss): continue
        if o.__module__==module.__name__ and not o.__name__.startswith('_'): yield o

losses = list(dict.fromkeys(o for m in modules for o in losses_of(m)))
each = pytest.mark.parametrize('cls', losses, ids=lambda o: o.__name__)

def test_found():
    assert len(losses)>=5
    assert all(any(losses_of(m)) for m in modules)

# ---- a student, a teacher, data ----

def image(i): return X[i]
def label(i): return Y[i]
def labels(i): return torch.eye(10)[Y[i]]

def data(y=label, bs=16, n=37, n_valid=20):
    "Two batches of 16 and an odd one of 5"
    ds = Datasets(list(range(n+n_valid)), [[image],[y]], splits=[list(range(n)),list(range(n,n+n_valid))])
    return ds.dataloaders(bs=bs, val_bs=32, drop_last=False, num_workers=0, device='cpu')

@lru_cache
def trained(setting):
    "A teacher, trained for a few batches"
    learn = Learner(data(setting.label, n=320), net(setting.width), loss_func=setting.criterion())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn.model

Setting = namedtuple('Setting', 'criterion label width')
# A loss is put into the first of these that it does not refuse:
settings = [
    Setting(CrossEntropyLossFlat, label, 6),             # one class of several
    Setting(CrossEntropyLossFlat, label, 4),             # a teacher as wide as the student
    Setting(BCEWithLogitsLossFlat, labels, 6)]           # yes or no for each class

# ---- fits ----

def grads(module): return {n: None if p.grad is None else p.grad.clone() for n,p in module.named_parameters()}

class Watch(Callback):
    "What the parts and gradients were"
    order,run_valid = GradientClip.order+2,False         # behind the opening of the fit, which is late in its event
    def __init__(self, loss):
        super().__init__()
        self.loss,self.start = loss,None
        self.parts,self.grads,self.loss_grads,self.traces = [],[],[],[]
    def before_batch(self):
        if self.start is None: self.start = {n: p.detach().clone() for n,p in self.loss.named_parameters()}
        self.traces.append(traces(self.model))
    def before_step(self):
        learns = {n for n,p in self.loss.named_parameters() if p.requires_grad}
        self.grads.append(grads(self.model))
        self.loss_grads.append({n: g for n,g in grads(self.loss).items() if n in learns})
        self.parts.append(self.kd.parts)

def mapped(f, o):
    "`f` of each tensor in nested dicts and tuples"
    if isinstance(o, torch.Tensor): return f(o)
    if isinstance(o, dict): return {k: mapped(f, v) for k,v in o.items()}
    return tuple(mapped(f, v) for v in o) if isinstance(o, tuple) else o

plain_copy = partial(mapped, lambda o: o.detach().clone())
double = partial(mapped, lambda o: o.double() if o.is_floating_point() else o)

def needs(v):
    "Whether a gradient goes back into it"
    return any(isinstance(o, torch.Tensor) and o.requires_grad for o in (v.values() if isinstance(v, dict) else [v]))

class Spy:
    "Reads, beside the loss, what it is given and what it returns"
    def __init__(self, loss):
        self.loss,self.built,self.calls = loss,None,[]
        build = loss.build
        def spying(**given):
            self.built = plain_copy(given)
            return build(**given)
        loss.build = spying
        self.handles = [loss.register_forward_hook(self.call, with_kwargs=True)]
    def call(self, loss, args, given, out):
        self.calls.append(SimpleNamespace(
            args=args, given=plain_copy(given), grads={n: needs(v) for n,v in given.items()}, out=out.detach(),
            auto=torch.is_autocast_enabled('cpu'), state=deepcopy(loss.state_dict()), training=loss.training))
    @property
    def training(self): return [c for c in self.calls if c.training]
    def remove(self):
        del self.loss.build
        for h in self.handles: h.remove()

_kinds = vars(nn.Linear(1, 1))
_hooks = [k for k in _kinds if 'hook' in k and isinstance(_kinds[k], dict)]
def traces(*models):
    "Hooks and attributes that a module of these kinds does not have by itself"
    own,res = {type(m): vars(m).keys() for m in net().modules()},[]
    for n,m in (o for model in models for o in model.named_modules()):
        res += [(n,k) for k in _hooks if vars(m)[k]]
        res += [(n,k) for k in vars(m).keys()-own[type(m)]]
    return res

def of_both(r):
    "The traces on both networks"
    return traces(*filter(None, (r.student,r.teacher)))

def names(loss): return loss.reads.keys() | loss.build_reads.keys()

def make(cls, seed=2):
    "The loss, and a student"
    student = net(s=seed)
    return cls.example(student, X[:4]),student

def alone(loss): return 0*TaskLoss()+loss

def ready(cls, setting, bs=16, cbs=(), label=None, **kwargs):
    "A Learner with the loss alone: the weight of the task loss is 0; `label` in the place of the setting's own"
    loss,student = make(cls)
    teacher = deepcopy(trained(setting)) if names(loss) & {'teacher_pred','fm_t','teacher'} else None
    kd,watch = KnowledgeDistillationCallback(teacher, alone(loss)),Watch(loss)
    watch.kd = kd
    dls = data(label or setting.label, bs, **kwargs)
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
            r.teacher.train()
            r.teacher.layer2.eval()                              # a user's own
            r.teacher.fc.bias.requires_grad_(False)
            r.flags,r.weights = flags(r.teacher),deepcopy(r.teacher.state_dict())
        r.spy = Spy(r.loss)
        try: return setting,fit(r, n=2)
        except ValueError as e: refused.append(e)
        finally: r.spy.remove()
    raise refused[0]

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def finite(gs): return all(g is None or g.isfinite().all() for g in gs.values())
def moves(g): return g is not None and g.abs().max()>0

# ---- the promises ----

def items(given):
    "How many items a loss was given"
    read = [given.get('pred'), *given.get('fm_s', {}).values(), *given.get('xb', ())]
    return next(len(v) for v in read if v is not None)

@each
def test_finite_scalar(cls):
    "On every batch, the odd last one too"
    r = done(cls)
    own = [n for n in r.watch.parts[0] if n not in ('task_loss','agreement')]
    assert len(r.watch.parts)==6
    assert len(own)>=1
    for p in r.watch.parts: assert all(abs(p[n])<float('inf') for n in own), p
    sizes = [items(c.given) for c in r.spy.training if {'pred','fm_s','xb'} & c.given.keys()]
    assert not sizes or sizes==[16,16,5]*2
    for c in r.spy.calls:
        assert c.out.shape==()
        assert c.out.dtype==torch.float32
        assert not c.args

def rests(loss, value):
    "Whether this was a batch that holds nothing for the loss, as it says there may be"
    return loss.rests and value==0

@each
def test_gradient_reaches_the_student(cls):
    "Its first weights too, on every batch, from this loss alone"
    r = done(cls)
    for g,c in zip(r.watch.grads, r.spy.training, strict=True):
        assert finite(g)
        assert moves(g['layer1.0.weight']) or rests(r.loss, c.out) and len(c.given['target'])<16

@each
def test_teacher_is_left_alone(cls):
    r = done(cls)
    for c in r.spy.calls: assert not any(c.grads.get(n) for n in ('teacher_pred','fm_t','target'))
    if r.teacher is None: return
    assert all(p.grad is None for p in r.teacher.parameters())
    assert same(r.teacher.state_dict(), r.weights)
    assert flags(r.teacher)==r.flags
    assert not {id(p) for p in r.loss.parameters()} & {id(p) for p in r.teacher.parameters()}

@each
def test_learned_parts_move(cls):
    r = done(cls)
    now,learns = dict(r.loss.named_parameters()),{n for n,p in r.loss.named_parameters() if p.requires_grad}
    assert now.keys()==r.watch.start.keys()
    for g in r.watch.loss_grads:
        assert finite(g)
        assert g.keys()==learns
    for n in learns:
        got = [g[n] for g in r.watch.loss_grads]
        assert any(g is not None for g in got), f'{n} never has a gradient'
        if now[n].ndim>1 or any(map(moves, got)):
            assert not torch.equal(now[n], r.watch.start[n]), f'{n} has not moved'
    for n in now.keys()-learns: assert torch.equal(now[n], r.watch.start[n])
    assert all(p.grad is None for p in now.values())

def student_alone(r): return [id(p) for p,*_ in r.learn.opt.all_params()]==[id(p) for p in r.student.parameters()]

@each
def test_student_comes_out_plain(cls, tmp_path):
    "The same keys, in their order; an exported Learner loads, predicts the same and does not know of us"
    r = done(cls)
    assert list(r.student.state_dict())==r.keys
    assert r.learn.model is r.student
    assert type(r.student) is nn.Sequential
    assert student_alone(r)
    assert r.learn.opt.state.keys()<={*r.student.parameters()}

    learn = deepcopy(r.learn)
    learn.remove_cb(Watch)                                                       # ours, of the test
    learn.export(tmp_path/'student.pkl')
    assert b'fasterdistill' not in (tmp_path/'student.pkl').read_bytes()
    got = load_learner(tmp_path/'student.pkl').model
    assert same(got.state_dict(), r.student.state_dict())
    assert not traces(got)
    with torch.no_grad(): assert torch.equal(got.eval()(X[:9]), deepcopy(r.student).eval()(X[:9]))

def everything(r):
    "All that the state dicts of both networks and of the loss hold"
    both = dict(student=r.student, teacher=r.teacher, loss=r.loss)
    states = {who: m.state_dict() for who,m in both.items() if m is not None}
    return {f'{who}.{k}': v.clone() for who,state in states.items() for k,v in state.items()}

class Opened(Callback):
    "The state when the fit is open, with nothing trained"
    order,run_valid = Watch.order,False
    def __init__(self, r):
        super().__init__()
        self.r,self.states = r,[]
    def before_batch(self): self.states.append(everything(self.r))

@each
def test_plan_and_trial_leave_no_trace(cls):
    "Averages too, although extra passes may move them in training"
    r = ready(cls, fits(cls))
    was,opened = everything(r),Opened(r)
    r.kd.plan(r.learn)
    assert same(everything(r), was)
    r.learn.add_cb(opened)
    fit(r)
    now = opened.states[0]
    assert same({k: now[k] for k in was}, was)                                   # what was built then has no before

@each
def test_nothing_stays(cls):
    "No hook, `forward` or attribute after a fit; while it ran there were hooks where activations are read"
    r = done(cls)
    assert not of_both(r)
    assert all(bool(t)==('fm_s' in names(r.loss)) for t in r.watch.traces)
    assert not r.loss.training
    assert len(r.watch.traces)==6

class Boom(Callback):
    "Raises `e` on the second batch"
    run_valid = False
    def __init__(self, event, e, order):
        super().__init__()
        self.e,self.order = e,order
        setattr(self, event, self.go)
    def go(self):
        if self.iter==1: raise self.e

@each
@pytest.mark.parametrize('event,e,order', [
    ('after_pred',KeyboardInterrupt(),0), ('after_loss',RuntimeError('in the middle'),7),
    ('before_step',RuntimeError('in the middle'),0)], ids=['after_pred','after_loss','before_step'])
def test_nothing_stays_after_an_exception(cls, event, e, order):
    boom = Boom(event, e, order)
    r = ready(cls, fits(cls), cbs=[boom])
    was = r.teacher is not None and flags(r.teacher)
    with pytest.raises(type(e)): fit(r)
    assert len(r.watch.traces)==2
    assert bool(r.watch.traces[1])==('fm_s' in names(r.loss))                    # it was in the middle
    assert not of_both(r)
    assert not r.loss.training
    if r.teacher is not None:
        assert flags(r.teacher)==was
        assert all(p.grad is None for p in r.teacher.parameters())
    assert student_alone(r)

    r.learn.remove_cb(boom)
    fit(r)
    assert finite(r.watch.grads[-1])
    assert not of_both(r)

def by_hand(loss, given):
    "The value with everything random at one seed"
    torch.manual_seed(0)
    for m in loss.modules():
        for v in vars(m).values():
            if isinstance(v, torch.Generator): v.manual_seed(0)
    return loss(**given)

class Dtypes(TorchFunctionMode):
    "Notes the dtype of every tensor that a function of torch returns"
    def __init__(self):
        super().__init__()
        self.seen = set()
    def __torch_function__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.seen |= {o.dtype for o in tree_leaves(out) if isinstance(o, torch.Tensor)}
        return out

def note_parts(spy):
    "The dtypes of what the parts of the spy's loss will return, once they are built"
    kinds,build = set(),spy.loss.build
    networks = {m for net in spy.loss.networks() for m in net.modules()}         # which run as the student does
    def note(m, _, out):
        kinds.update(o.dtype for o in tree_leaves(out) if isinstance(o, torch.Tensor) and o.is_floating_point())
    def noting(**given):
        build(**given)
        for m in spy.loss.modules():
            if m is not spy.loss and m not in networks: spy.handles.append(m.register_forward_hook(note))
    spy.loss.build = noting
    return kinds

def tensors(given, *names):
    "What was given under these names, of which some hold a dict"
    for o in (given.get(n) for n in names):
        if o is not None: yield from o.values() if isinstance(o, dict) else [o]

@each
def test_autocast(cls):
    """The networks in half precision, the arithmetic of the loss and of its parts in float32:
    it agrees with float64 on what it was given"""
    r = ready(cls, fits(cls), cbs=[HalfCPU()])
    spy = Spy(r.loss)
    kinds = note_parts(spy)
    fit(r)
    spy.remove()
    assert len(spy.training)==3
    assert not any(c.auto for c in spy.training)
    assert kinds<={torch.float32}
    assert all(p.dtype==torch.float32 for p in r.loss.parameters())
    assert all(map(finite, r.watch.grads))
    for c in spy.training:
        assert c.out.dtype==torch.float32
        assert c.out.isfinite()
        assert all(v.dtype==torch.float32 for v in tensors(c.given, 'pred', 'teacher_pred', 'fm_s', 'fm_t'))

    if {'student','teacher'} & r.loss.reads.keys(): return
    last = spy.training[-1]
    with Dtypes() as made: by_hand(deepcopy(r.loss), last.given)
    assert torch.float32 in made.seen
    assert not made.seen & {torch.bfloat16,torch.float16}

    if {'task_loss','criterion'} & {n for n,need in r.loss.reads.items() if need}: return
    twin = deepcopy(r.loss).train()
    twin.load_state_dict(last.state)
    if by_hand(deepcopy(twin), last.given)!=last.out: return        # it draws from the global generator: other numbers
    assert abs(by_hand(twin.double(), double(last.given))-last.out)<=1e-4*last.out.abs()

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
    why = f'at least {need} items, these have {need-1}: it would never be computed'
    with pytest.raises(ValueError, match=why): fit(r)
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
        if not every and not rests(r.loss, c.out): assert g['layer1.0.weight'].abs().max()>0
    ys = [c.given['target'] for c in calls if c.given.get('target') is not None]
    if ys:                                           # it reads them, and got them as they are
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
    ids = {n: id(p) for n,p in r.loss.named_parameters()}
    values = {n: p.detach().clone() for n,p in r.loss.named_parameters()}
    n = len(r.watch.loss_grads)
    fit(r, 'fit_one_cycle')
    now = dict(r.loss.named_parameters())
    assert {n: id(p) for n,p in now.items()}==ids
    assert len(r.watch.loss_grads)==2*n
    for k,p in now.items():
        if p.requires_grad and any(moves(g[k]) for g in r.watch.loss_grads[n:]):
            assert not torch.equal(p, values[k]), f'{k} has not moved'

scope = dict(partial=partial)
for _m in (fasterdistill.loss,fasterdistill.networks.adapters,*modules):
    scope.update({k: v for k,v in vars(_m).items() if not k.startswith('__')})

@each
def test_repr(cls):
    "It prints the expression back"
    loss,_ = make(cls)
    args = [*loss._args[0],*loss._args[1].values()]
    mine = scope | {type(o).__name__: o for o in args if isinstance(o, nn.Module)}
    exprs = [loss, .1*TaskLoss()+2*loss, ramp(3)*(TaskLoss()+.5*loss), 3*(.1*loss+ramp(2)*(steps({0:1, 3:2})*loss))]
    if names(loss) & {'fm_s','fm_t'}: exprs += [loss.at('layer2'), loss.at(['layer2','layer3'], ['layer1','layer3'])]
    for o in exprs:
        assert repr(eval(repr(o), mine))==repr(o)
        assert loss.__class__.__name__ in repr(o)
    assert repr(done(cls).loss)==repr(loss)                                      # and is not changed by a fit

@lru_cache
def nets(cls):
    "Copies of the two networks, for a loss that reads them"
    r = done(cls)
    both = dict(student=r.student, teacher=r.teacher)
    return {n: deepcopy(m).eval() for n,m in both.items() if m is not None}

def given_to(cls):
    "What the loss and its `build` read in the fit, as plain tensors"
    def own(n, v):
        if n in ('student','teacher') and v: return Net(nets(cls)[n], X[:16], layers=v.layers)
        return plain_copy(v)
    spy = done(cls).spy
    return [{n: own(n, v) for n,v in given.items()} for given in (spy.training[0].given,spy.built or {})]

@each
def test_by_hand(cls):
    "On tensors with keywords: finite, with gradients for what comes from the student; in the dtype it is given"
    given,built = given_to(cls)
    loss,_ = make(cls)
    loss.build(**built)
    loss.train()
    ins = [v.requires_grad_() for v in tensors(given, 'pred', 'fm_s')]
    v = by_hand(deepcopy(loss), given)
    assert v.shape==()
    assert v.isfinite()
    assert v.dtype==torch.float32
    if ins:
        gs = [g for g in torch.autograd.grad(v, ins, allow_unused=True) if g is not None]
        assert all(g.isfinite().all() for g in gs)
        assert max(g.abs().max() for g in gs)>0
    if not {'student','teacher'} & names(loss):
        assert by_hand(deepcopy(loss).double(), double(plain_copy(given))).dtype==torch.float64

@each
def test_copies_and_checkpoints(cls):
    "A copy and a new loss with the saved state give the same value and share nothing"
    given,built = given_to(cls)
    loss = done(cls).loss
    want = by_hand(loss, given)
    twin,(fresh,_) = deepcopy(loss),make(cls, seed=5)
    assert repr(twin)==repr(loss)
    assert by_hand(twin, given)==want
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in loss.parameters()}

    fresh.build(**built)
    fresh.eval()
    before = by_hand(fresh, given)
    assert not dict(loss.named_parameters()) or before!=want
    fresh.load_state_dict(loss.state_dict())
    assert by_hand(fresh, given)==want
