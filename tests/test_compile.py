"""Networks that are compiled (`m.compile()`, `torch.compile(m)`), wrapped in a DataParallel, or on another device: the
same losses as without, or a clear refusal. The other opinion is always the same fit with nothing compiled. Dynamo's own
backend 'aot_eager' decides as inductor does what is compiled again and which hooks it sees, in a tenth of the time."""
import os
import shutil
from functools import partial

import pytest
import torch
from common import (KD,At,HalfCPU,Rounded,StepLosses,X,assert_close,assert_same,furthest,get_dls,in_float64,learner,
                    left,net,raising,real,refuses,seed,state)
from fastai.callback.core import CancelValidException
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import SoftTarget

losses = dict(
    default=lambda: None, FitNet=lambda: TaskLoss()+FitNet(), FCFD=lambda: TaskLoss()+FCFD(),
    overwritten=lambda: TaskLoss()+FitNet().at('layer2.1'))              # an in-place ReLU follows that one

def as_is(m, backend): return m
def method(m, backend):
    m.compile(backend=backend)
    return m
def wrapped(m, backend): return torch.compile(m, backend=backend)
def part(m, backend):
    m.layer2.compile(backend=backend)
    return m
def graphs(): return counters['stats']['unique_graphs']

@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()

class Ran:
    """A fit for each loss named, on one student and one teacher, which the functions `student` and `teacher` compile;
    `warm` calls both before"""
    def __init__(self, names, student=as_is, teacher=as_is, backend='aot_eager', warm=False, epochs=2, dls=None,
                 cbs=()):
        self.t = teacher(net(8, s=1), backend)
        self.learn = learner(student(net(), backend), dls=dls() if dls else get_dls(shuffle=False))
        had = left(self.learn, self.t)                     # torch.compile(m) has a `forward` of its own
        if warm: self.call()
        losses_seen = StepLosses()
        self.losses,self.valid,self.graphs = losses_seen.vals,[],[]
        for name in names:
            n = graphs()
            seed(3)
            self.learn.fit(epochs, cbs=[KD(self.t, losses[name]()),losses_seen,*cbs])
            self.graphs.append(graphs()-n)
            self.valid += self.learn.recorder.values
            assert left(self.learn, self.t)==had
    def call(self):
        x = real(X[:32])
        self.learn.validate()
        self.learn.model.train()(x)                        # with BatchNorm's averages: the other run does it too
        with torch.no_grad(): self.t.eval()(x)
        self.t.train()
    @property
    def weights(self): return {k.removeprefix('_orig_mod.'): v for k,v in state(self.learn.model).items()}

def same(a, b, tol=1e-10):
    "Two runs took the same steps"
    close = partial(torch.testing.assert_close, rtol=tol, atol=tol)
    assert len(a.losses)==len(b.losses)>0
    close(a.losses, b.losses)
    close(*([[v for v in o if v is not None] for o in r.valid] for r in (a,b)))
    assert_close(a.weights, b.weights, tol)
    bare,x = net(),real(X[:32])
    bare.load_state_dict(a.weights)
    a.learn.model.eval()
    with torch.no_grad(): close(a.learn.model(x), bare.eval()(x))

plain = {}
def uncompiled(names, **kwargs):
    "The fit that nothing is compiled in, run once"
    key = names,*map(str, kwargs.items())
    if key not in plain: plain[key] = Ran(names, **kwargs)
    return plain[key]

who = dict(
    student=dict(student=method), teacher=dict(teacher=method), both=dict(student=method, teacher=method),
    wrapped_student=dict(student=wrapped), wrapped_both=dict(student=wrapped, teacher=wrapped),
    part=dict(student=part, teacher=part))

def compare(names, nets, **kwargs):
    ran = Ran(names, **nets, **kwargs)
    same(ran, uncompiled(names, **{k: v for k,v in kwargs.items() if k!='backend'}))
    most = 2*('student' in nets)+('teacher' in nets)       # the student's two modes, the teacher's one: none a batch
    for n,name in zip(ran.graphs, names, strict=True): assert (name!='default')<=n<=most
    assert sum(ran.graphs)>0
    return ran

# ---- compiled ----

often = {k: v for k,v in who.items() if k not in ('student','teacher','wrapped_student')}

@in_float64
@pytest.mark.parametrize('nets', [
    pytest.param(v, id=k, marks=[pytest.mark.slow]*(k not in often)) for k,v in who.items()])
def test_same_losses(nets):
    "Each fit finds graphs that were made when other hooks were there, or none"
    compare(('default','FitNet','FCFD'), nets, warm=True)

@in_float64
@pytest.mark.slow
@pytest.mark.parametrize('names,warm', [
    (('FCFD','overwritten','default','FitNet'),True), (('FitNet','default','FCFD'),False)],
    ids=['called_before','new'])
@pytest.mark.parametrize('nets', who.values(), ids=who)
def test_same_losses_in_other_orders(nets, names, warm): compare(names, nets, warm=warm)

@in_float64
def test_overwritten_activation():
    "A graph that keeps what a later module writes over keeps a copy too"
    compare(('overwritten',), who['both'])

compilers = filter(None, [os.environ.get('CXX'),'g++','clang++','c++'])
inductor = pytest.mark.skipif(not any(map(shutil.which, compilers)), reason='inductor needs a C++ compiler')

@inductor
@in_float64
def test_inductor():
    "What `m.compile()` means unless told otherwise; one graph, since each costs seconds"
    untested = At('before_validate', raising(CancelValidException))
    ran = compare(('FitNet',), dict(student=method), backend='inductor', epochs=1, cbs=[untested])
    assert ran.graphs==[1]

@inductor
@in_float64
@pytest.mark.slow
@pytest.mark.parametrize('nets', [who['both'],who['wrapped_both']], ids=['method','wrapped'])
def test_inductor_in_all(nets): compare(('default','overwritten','FCFD'), nets, backend='inductor', warm=True)

def test_keys():
    "`torch.compile(m)` puts a name of its own before those of the weights; layers are found by their own names"
    for how,prefix in ((method,''), (wrapped,'_orig_mod.')):
        m = how(net(), 'aot_eager')
        keys = [*m.state_dict()]
        assert keys==[prefix+k for k in net().state_dict()]
        kd = KD(net(8, s=1), TaskLoss()+FitNet().at(['layer2','stage3']))
        learner(m, dls=get_dls(shuffle=False)).fit(1, cbs=kd)
        assert [*m.state_dict()]==keys

def test_plan_compiles_nothing():
    m,t = method(net(), 'aot_eager'),method(net(8, s=1), 'aot_eager')
    learn,was = learner(m),state(m)
    KD(t, TaskLoss()+FitNet()+FCFD()).plan(learn)
    assert graphs()==0
    assert left(learn, t)==[]
    assert_same(was, state(m))

@in_float64
def test_shorter_last_batch():
    "Another size of batch is one more graph a mode at the most, then none"
    dls = partial(get_dls, n=80, valid=48, shuffle=False, drop_last=False)
    a,b = Ran(('FitNet',), **who['both'], dls=dls, epochs=3),Ran(('FitNet',), dls=dls, epochs=3)
    same(a, b)
    assert len(a.losses)==9
    assert a.graphs[0]<=6

def test_autocast():
    "In half precision, to what one rounding of the inputs changes"
    def ran(*cbs, **nets): return Ran(('FitNet',), **nets, cbs=[HalfCPU(),*cbs])
    a,b = ran(**who['both']),ran()
    assert a.graphs[0]<=3
    same(a, b, min(furthest(ran(Rounded()).weights, b.weights), 1e-6))

@in_float64
def test_interrupted():
    "An error in a batch, then another fit and a prediction"
    def go(how):
        learn,t = learner(how(net(), 'aot_eager'), dls=get_dls(shuffle=False)),how(net(8, s=1), 'aot_eager')
        seed(3)
        stop,losses = At('after_loss', raising(KeyboardInterrupt), skip=1),StepLosses()
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[KD(t, TaskLoss()+FitNet()),stop])
        assert left(learn, t)==[]
        seed(4)
        learn.fit(1, cbs=[KD(t, TaskLoss()+FCFD()),losses])
        assert left(learn, t)==[]
        return losses.vals,learn.model.eval()(real(X[:8])).tolist()
    torch.testing.assert_close(go(method), go(as_is), rtol=1e-10, atol=1e-10)

@in_float64
@pytest.mark.parametrize('nets', who.values(), ids=who)
def test_refused_by_a_torch_that_cannot_run_it_uncompiled(nets, monkeypatch):
    "Before torch 2.6, what reads inside a compiled network is refused before training; what reads predictions is not"
    monkeypatch.delattr(torch.compiler, 'set_stance')
    m,t = nets.get('student', as_is)(net(), 'aot_eager'),nets.get('teacher', as_is)(net(8, s=1), 'aot_eager')
    learn = learner(m)
    for loss,reads in ((FitNet,'fm_s, fm_t'), (FCFD,'fm_s, student, fm_t, teacher')):
        says = ('a compiled network can be read inside from torch 2.6 on, '
                f'.*leave out the losses that read {reads}, or train without')
        refuses(learn, says, KD(t, TaskLoss()+loss()), teachers=[t])
    assert graphs()==0
    same(Ran(('default',), **nets), uncompiled(('default',)))

@in_float64
def test_an_old_torch_reads_what_is_not_compiled(monkeypatch):
    monkeypatch.delattr(torch.compiler, 'set_stance')
    same(Ran(('FitNet',)), uncompiled(('FitNet',)))

# ---- DataParallel ----

def parallel(name, how):
    "Losses and weights of a fit whose model is in a DataParallel, by hand or by fastai"
    learn,t,losses_seen,kinds = learner(net(), dls=get_dls(shuffle=False)),net(8, s=1),StepLosses(),set()
    if how=='wrapped': learn.model = nn.DataParallel(learn.model)
    if how=='fastai':
        from fastai.distributed import ParallelTrainer
        learn.add_cb(ParallelTrainer([]))
    seed(3)
    note = At('before_backward', lambda l: kinds.add(type(l.model)))
    learn.fit(2, cbs=[KD(t, losses[name]()),losses_seen,note])
    assert left(learn, t)==[]
    assert kinds=={nn.Sequential if how=='plain' else nn.DataParallel}
    return losses_seen.vals,state(getattr(learn.model, 'module', learn.model))

@pytest.mark.parametrize('how', ['wrapped','fastai'])
@pytest.mark.parametrize('name', ['default','FitNet','FCFD'])
def test_data_parallel_without_devices(name, how):
    "On a CPU the wrapper calls the module; fastai's callback puts it on for the fit"
    if how=='fastai': pytest.importorskip('accelerate', reason="fastai.distributed needs accelerate")
    (vals,w),(vals0,w0) = parallel(name, how),parallel(name, 'plain')
    assert vals==vals0
    assert_same(w, w0)

def test_data_parallel_over_devices_is_refused():
    "Where each layer sees a part of the batch at a time"
    learn,t = learner(net()),net(8, s=1)
    learn.model = nn.DataParallel(learn.model)
    learn.model.device_ids = [0,1]
    says = r'the student is a DataParallel over 2 devices.*learn\.distrib_ctx\(\)'
    for loss in (FitNet,FCFD): refuses(learn, says, KD(t, TaskLoss()+loss()), teachers=[t])
    assert left(learn, t)==[]

# ---- other devices ----

gone = pytest.mark.skipif(not torch.backends.mps.is_available(), reason='needs an Apple GPU (MPS)')

@pytest.mark.parametrize('device', [
    'cpu', pytest.param('cuda', marks=pytest.mark.cuda), pytest.param('mps', marks=gone)])
@pytest.mark.parametrize('loss', [lambda: .5*TaskLoss()+.5*SoftTarget()+FitNet(), lambda: TaskLoss()+FCFD()],
                         ids=['SoftTarget+FitNet','FCFD'])
def test_on_a_device(device, loss):
    learn,t = learner(net(), dls=get_dls(shuffle=False).to(torch.device(device))),net(8, s=1)
    learn.model.to(device)
    cb,was = KD(t, loss()),state(learn.model)
    learn.fit(2, cbs=cb)
    assert left(learn, t)==[]
    assert {p.device.type for p in (*learn.model.parameters(),*cb.loss.parameters())}=={device}
    assert all(torch.tensor([*h.values()]).isfinite().all() for h in cb.history)
    assert len(cb.history)==2
    assert not torch.equal(was['fc.weight'], learn.model.fc.weight)

class Dtypes(TorchDispatchMode):
    "The kinds of number that operations make"
    def __init__(self):
        super().__init__()
        self.seen = {}
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for o in tree_leaves(out):
            if isinstance(o, torch.Tensor): self.seen.setdefault(o.dtype, set()).add(str(f))
        return out

@pytest.mark.parametrize('name', ['default','FitNet','FCFD'])
def test_no_float64(name):
    "An Apple GPU has none"
    learn = learner(net(), dls=get_dls(shuffle=False))
    with Dtypes() as d: learn.fit(1, cbs=KD(net(8, s=1), losses[name]()))
    seen = {t: sorted(fs) for t,fs in d.seen.items()}
    assert seen[torch.float32]
    assert seen.get(torch.float64) is None
