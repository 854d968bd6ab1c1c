"What losses learned, with the best student that `SaveModelCallback` brings back, and without a fit"
import os
import random
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from common import KD,At,X,Y,assert_same,flags,in_float64,learner,left,net,raising,seed,state
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback,SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.optimizer import Adam,OptimWrapper
from torch import nn
from torch.utils.data import DataLoader as TorchLoader

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.fit.beside import write_parts
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.losses.ofa import OFA
from fasterdistill.losses.tas import TAS
from fasterdistill.losses.uskd import USKD
from fasterdistill.networks.net import Net

losses = dict(ofa=OFA, infonce=lambda: InfoNCE(learn_tau=True), tas=TAS, fitnet=FitNet, uskd=USKD)
each = pytest.mark.parametrize('make', losses.values(), ids=losses)
first = partial(SaveModelCallback, comp=lambda now, best: np.isinf(best))     # the first epoch is the best

class Epochs(Callback):
    "What student and loss are after each epoch"
    order = 62                                                 # when all is saved
    def __init__(self, loss): self.loss,self.student,self.parts = loss,[],[]
    def after_epoch(self):
        self.student.append(state(self.model))
        self.parts.append(state(self.loss))

class Steps(Callback):
    "How many steps the optimizer has counted for the first learned part"
    order,run_valid = 20,False
    def __init__(self, loss): self.loss,self.counts = loss,[]
    def before_step(self):
        p,opt = next(p for p in self.loss.parameters() if p.requires_grad),self.learn.opt
        self.counts.append(int(getattr(opt, 'opt', opt).state[p].get('step', 0)))

def student(): return net(s=0)
def teacher(): return net(8, s=1)

def distilling(make=OFA, model=None, *cbs, **kwargs):
    "A Learner, its callback and what remembers its epochs"
    loss = make()
    kd = KD(None if isinstance(loss, USKD) else teacher(), TaskLoss()+loss)
    epochs = Epochs(kd.loss)
    learn = learner(student() if model is None else model, cbs=[kd,epochs,*cbs], **kwargs)
    seed(3)
    return learn,kd,epochs

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def of_epoch(learn, epochs):
    "Of which epoch student and learned parts are"
    def at(now, was): return [i for i,o in enumerate(was) if same(now, o)]
    return at(state(learn.model), epochs.student),at(state(epochs.loss), epochs.parts)

# ---- with the best student ----

@each
def test_parts_follow_the_best_student(make):
    "Both are of the first epoch, and were something else after the last one; fastai reads its file as ever"
    learn,kd,epochs = distilling(make)
    learn.fit(3, cbs=first())
    assert of_epoch(learn, epochs)==([0],[0])
    assert left(learn)==[]
    plain = learner(student()).load('model')
    assert_same(state(plain.model), epochs.student[0])
    assert sorted(os.listdir('models'))==['model.parts.pth','model.pth']
    kept = torch.load('models/model.parts.pth', weights_only=True)
    assert_same(kept, epochs.parts[0])

def test_the_last_epoch_may_be_the_best():
    learn,kd,epochs = distilling()
    learn.fit(3, cbs=SaveModelCallback())
    assert learn.recorder.values[-1][1]==min(o[1] for o in learn.recorder.values)
    assert of_epoch(learn, epochs)==([2],[2])

@pytest.mark.parametrize('opt', [partial(Adam), partial(OptimWrapper, opt=torch.optim.Adam)], ids=['fastai','torch'])
@pytest.mark.parametrize('with_opt', [True,False])
def test_what_the_optimizer_knows(with_opt, opt):
    "With the student's optimizer that of the parts goes back, and without stays; the next fit goes on with it"
    learn,kd,epochs = distilling(opt_func=opt)
    learn.fit(3, 1e-3, cbs=first(with_opt=with_opt))
    assert of_epoch(learn, epochs)==([0],[0])
    steps = Steps(epochs.loss)
    learn.fit(1, 1e-3, cbs=steps)
    assert steps.counts==([3,4,5] if with_opt else [9,10,11])

@in_float64
def test_goes_on_as_if_the_later_epochs_had_not_been():
    "Student, parts and optimizer of the first epoch: one more epoch is the same as the second of a fit without a best"
    def fit(n, **kwargs):
        learn,kd,epochs = distilling(FitNet)
        learn.dls.train.rng = random.Random(0)
        learn.fit(n, **kwargs)
        return learn,epochs
    learn,epochs = fit(3, cbs=first(with_opt=True))
    again,short = fit(1)
    for o in (learn,again):
        o.dls.train.rng = random.Random(1)
        o.fit(1)
    assert_same(state(learn.model), state(again.model))
    assert_same(state(epochs.loss), state(short.loss))

def test_a_name_and_a_folder_of_ones_own(tmp_path):
    learn,kd,epochs = distilling(model_dir='kept')
    learn.fit(2, cbs=first(fname='best.of.all'))
    assert of_epoch(learn, epochs)==([0],[0])
    assert sorted(os.listdir('kept'))==['best.of.all.parts.pth','best.of.all.pth']

def test_two_that_save():
    "The one that loads last decides, of students as of parts"
    learn,kd,epochs = distilling()
    learn.fit(3, cbs=[first(fname='first'),SaveModelCallback(fname='best')])
    assert of_epoch(learn, epochs)==([2],[2])
    assert_same(torch.load('models/first.parts.pth', weights_only=True), epochs.parts[0])

@pytest.mark.parametrize('every', [True,2])
def test_every_epoch(every):
    "Each file has its own beside it; none is brought back, and a hand may take any"
    learn,kd,epochs = distilling()
    learn.fit(3, cbs=SaveModelCallback(every_epoch=every))
    saved = range(0, 3, int(every))
    names = [f'model_{i}{o}' for i in saved for o in ('.parts.pth','.pth')]
    assert sorted(os.listdir('models'))==names
    assert of_epoch(learn, epochs)==([2],[2])
    for i in saved: assert_same(torch.load(f'models/model_{i}.parts.pth', weights_only=True), epochs.parts[i])

def test_at_end():
    learn,kd,epochs = distilling()
    learn.fit(2, cbs=first(at_end=True))
    assert of_epoch(learn, epochs)==([1],[1])
    assert_same(torch.load('models/model.parts.pth', weights_only=True), epochs.parts[1])

def test_early_stopping():
    learn,kd,epochs = distilling()
    learn.fit(9, cbs=[first(), EarlyStoppingCallback(comp=np.greater, patience=2)])
    assert len(epochs.parts)==3
    assert of_epoch(learn, epochs)==([0],[0])

def test_a_fit_that_is_cancelled_in_an_epoch():
    "After the first batch of the second epoch, which by then has moved the parts"
    learn,kd,epochs = distilling()
    learn.fit(3, cbs=[SaveModelCallback(), At('after_batch', raising(CancelFitException), skip=3+2)])
    assert len(epochs.parts)==1
    assert of_epoch(learn, epochs)==([0],[0])

def test_no_epoch_is_better():
    "A second fit that betters nothing brings back the best of the first"
    learn,kd,epochs = distilling()
    save = first(reset_on_fit=False)
    learn.fit(2, cbs=save)
    learn.fit(2, cbs=save)
    assert of_epoch(learn, epochs)==([0],[0])

@pytest.mark.filterwarnings('error::UserWarning')
def test_lr_find_saves_and_loads_nothing():
    learn,kd,epochs = distilling(OFA, None, first())
    learn.lr_find(show_plot=False, num_it=3)
    assert [o for o in os.listdir('models') if 'model' in o]==[]

@pytest.mark.parametrize('make', [SoftTarget,lambda: FitNet(adapter=None).at('pool')], ids=['logits','no adapter'])
def test_nothing_learned_nothing_kept(make):
    learn,kd,epochs = distilling(make, net(8))
    learn.fit(2, cbs=first())
    assert os.listdir('models')==['model.pth']
    assert of_epoch(learn, epochs)[0]==[0]

@pytest.mark.filterwarnings('error:SaveModel')
@pytest.mark.parametrize('lost', ['gone','of another loss'])
def test_a_warning_says_what_stays(lost):
    "A student that another fit saved is the best still"
    save = first(reset_on_fit=False)
    other,_,_ = distilling(FitNet)
    other.fit(1, cbs=save)
    if lost=='gone': os.remove('models/model.parts.pth')
    learn,kd,epochs = distilling(OFA)
    save.best = 0.
    why = 'there is no' if lost=='gone' else 'does not fit'
    with pytest.warns(UserWarning, match=f'(?s)save_model has brought back.*OFA.*stays as after the last epoch.*{why}'):
        learn.fit(2, cbs=save)
    assert of_epoch(learn, epochs)[1]==[1]
    assert left(learn)==[]

def test_a_resumed_fit():
    "The best epoch was in a process that is gone: the file beside knows it"
    class Stop(Exception): ...
    stopped,_,before = distilling()
    with pytest.raises(Stop):
        stopped.fit(3, cbs=[first(), Checkpoint('run'), At('before_train', raising(Stop), skip=2)])
    learn,kd,epochs = distilling()
    learn.fit(3, cbs=[first(), Checkpoint('run', resume=True)])
    assert_same(state(learn.model), before.student[0])
    assert_same(state(epochs.loss), before.parts[0])

def test_epochs_that_a_resumed_fit_passes_over_are_not_written_again():
    "Not by parts that are ready, and of no epoch"
    class Stop(Exception): ...
    stopped,_,before = distilling()
    with pytest.raises(Stop):
        stopped.fit(3, cbs=[SaveModelCallback(every_epoch=True), Checkpoint('run'),
                            At('before_train', raising(Stop), skip=2)])
    learn,kd,epochs = distilling()
    kd.ready()
    learn.fit(3, cbs=[SaveModelCallback(every_epoch=True), Checkpoint('run', resume=True)])
    for i in range(2): assert_same(torch.load(f'models/model_{i}.parts.pth', weights_only=True), before.parts[i])
    assert_same(torch.load('models/model_2.parts.pth', weights_only=True), state(kd.loss))

def test_a_write_that_dies_leaves_the_file_before(monkeypatch):
    learn,kd,epochs = distilling()
    learn.fit(1, cbs=first())
    def half(state, f, **kwargs):
        f.write_bytes(b'half of it')
        raise OSError('no space left')
    with monkeypatch.context() as m, pytest.raises(OSError, match='no space left'):
        m.setattr(torch, 'save', half)
        write_parts(kd.learned, 'models/model.pth', False)
    assert_same(torch.load('models/model.parts.pth', weights_only=True), epochs.parts[0])

def test_learners_without_distillation_save_as_ever():
    learn = learner(student())
    learn.fit(2, cbs=first())
    assert os.listdir('models')==['model.pth']

# ---- without a fit ----

def answers(ofa, model):
    "What the exits say"
    view = Net(model.eval(), X[:9], ['layer1','layer2','layer3'])(X[:9], bn='eval')
    return [head(z) for head,z in zip(ofa.heads.eval(), view.fm.values(), strict=True)]

@torch.no_grad()
def test_kept_weights_load_before_a_fit():
    "In a new Learner: the exits say the same, and a fit begins with them"
    learn,kd,epochs = distilling()
    with torch.enable_grad(): learn.fit(1)
    learn.save('student')
    torch.save(kd.loss.state_dict(), 'exits.pth')
    want = answers(kd.loss.losses[1], learn.model)

    later,kd,epochs = distilling()
    later.load('student')
    assert kd.ready() is kd.loss
    kd.ready(later).load_state_dict(torch.load('exits.pth'))
    for a,b in zip(answers(kd.loss.losses[1], later.model), want, strict=True): assert torch.equal(a, b)
    loaded,seen = state(epochs.loss),[]
    with torch.enable_grad():
        later.fit(1, cbs=At('before_step', lambda _: seen.append(dict(epochs.loss.named_parameters())), skip=0))
    assert {*seen[0]}<={*loaded} and seen[0]
    assert left(later)==[]

def test_a_fit_begins_with_the_parts_that_are_ready():
    learn,kd,epochs = distilling()
    kd.ready()
    ids,values = [id(p) for p in epochs.loss.parameters()],state(epochs.loss)
    seen = []
    learn.fit(1, cbs=At('before_backward', lambda _: seen.append(state(epochs.loss)), skip=0))
    params = dict(epochs.loss.named_parameters())
    assert ids==[id(p) for p in params.values()]
    for k in params: assert torch.equal(seen[0][k], values[k])
    assert any(not torch.equal(p, values[k]) for k,p in params.items())

@each
def test_twice_is_harmless(make):
    learn,kd,epochs = distilling(make)
    kd.ready()
    ids,values = [id(p) for p in epochs.loss.parameters()],state(epochs.loss)
    assert ids
    kd.ready()
    assert [id(p) for p in epochs.loss.parameters()]==ids
    assert_same(state(epochs.loss), values)
    learn.fit(1)
    values = state(epochs.loss)
    kd.ready()
    assert_same(state(epochs.loss), values)
    assert not epochs.loss.training

def everything(learn):
    "Random states, loader, networks, optimizer"
    return dict(torch=torch.get_rng_state().tolist(), numpy=str(np.random.get_state()), python=random.getstate(),
                loader=learn.dls.train.rng.getstate(), opt=learn.opt, flags=flags(learn.model), cbs=list(learn.cbs),
                has={k for k in ('xb','yb','pred','loss') if k in vars(learn)}, metrics=list(learn.metrics))

@each
def test_nothing_else_is_changed(make):
    learn,kd,epochs = distilling(make)
    learn.model.layer2.eval()
    networks = [learn.model,*(kd.teacher.networks() if kd.teacher is not None else [])]
    was,states,of = everything(learn),[state(m) for m in networks],[flags(m) for m in networks]
    kd.ready()
    assert everything(learn)==was
    for m,s,f in zip(networks, states, of, strict=True):
        assert_same(state(m), s)
        assert flags(m)==f
    assert left(learn)==[]
    assert not epochs.loss.training
    assert all(p.grad is None for p in epochs.loss.parameters())

def test_the_same_fit_but_for_first_weights():
    "Where what is learned is set to one value, a fit after `ready` is the fit without it, to the last bit"
    def fit(ready):
        learn,kd,epochs = distilling(lambda: FitNet(conv))
        if ready: kd.ready()
        learn.fit(2)
        return state(learn.model),state(epochs.loss)
    for a,b in zip(fit(True), fit(False), strict=True): assert_same(a, b)

@pytest.mark.parametrize('what', ['plan','ready'])
def test_torchs_loaders_give_the_same_batches_afterwards(what):
    "Shuffled by a generator of their own"
    def fit(first):
        items = list(zip(X[:64], Y[:64], strict=True))
        loaders = [TorchLoader(items, 16, shuffle=True, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
        learn,kd,epochs = distilling(lambda: FitNet(conv), dls=DataLoaders(*loaders))
        if first: getattr(kd, what)()
        learn.fit(2)
        return state(learn.model)
    assert_same(fit(True), fit(False))

def conv(s, t):
    draws = torch.Generator().manual_seed(1)
    res = nn.Conv2d(s.shape[1], t.shape[1], 1)
    with torch.no_grad():
        for p in res.parameters(): p.copy_(torch.rand(p.shape, generator=draws))
    return res

def test_the_loss_that_suits_is_made():
    learn = learner(student())
    kd = KD(teacher())
    assert repr(kd.ready(learn))=='SoftTarget()'

def test_errors_are_a_fits_own():
    learn = learner(student())
    with pytest.raises(ValueError, match=r'ready\(\) needs a Learner: ready\(learn\)'): KD(teacher(), FitNet()).ready()
    with pytest.raises(ValueError, match="no layer 'layer33'"): KD(teacher(), FitNet().at('layer33')).ready(learn)
    loss = FitNet()
    KD(teacher(), loss).ready(learn)
    with pytest.raises(ValueError, match='trained with another student'): KD(teacher(), loss).ready(learner(net(s=9)))

def test_refused_in_a_fit():
    learn,kd,epochs = distilling()
    with pytest.raises(RuntimeError, match='before or after a fit'):
        learn.fit(1, cbs=At('after_batch', lambda _: kd.ready(), skip=1))
    assert left(learn)==[]

def test_plan_after_ready():
    learn,kd,epochs = distilling()
    before = kd.plan().learned
    kd.ready()
    values = state(epochs.loss)
    assert kd.plan().learned==before==sum(p.numel() for p in epochs.loss.parameters())
    assert_same(state(epochs.loss), values)

def test_copies():
    "A copied Learner has parts of its own, ready as they were"
    learn,kd,epochs = distilling()
    kd.ready()
    twin = deepcopy(learn)
    other = twin.knowledge_distillation.loss
    assert_same(state(other), state(kd.loss))
    twin.fit(1)
    assert not same(state(other), state(kd.loss))
