"A fit that goes on from a checkpoint ends, to the last bit, as the one that was never stopped"
import copy
import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from common import KD,At,assert_same,get_dls,learner,left,net,raising,seed,state
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.optimizer import Adam,OptimWrapper,SGD
from torch import nn

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import TaskLoss,ramp
from fasterdistill.losses.crd import CRD
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import SoftTarget

class Stop(Exception): ...

class Noise(Callback):
    "Draws from all three global generators"
    run_valid = False
    def before_batch(self):
        gain = 1+.1*np.random.rand()+.1*random.random()
        self.learn.xb = (self.xb[0]*gain+.1*torch.randn(1),)

losses = dict(
    fitnet=lambda: TaskLoss()+SoftTarget()+ramp(3)*FitNet().at(['layer2','layer3']),
    fcfd=lambda: TaskLoss()+FCFD(), share=lambda: FitNet().at('layer3'),
    crd=lambda: TaskLoss()+.8*CRD(width=16))
opts = dict(sgd=partial(SGD, mom=.9), adam=Adam, torch=partial(OptimWrapper, opt=torch.optim.AdamW))

def student():
    m = net()
    m.flat = nn.Sequential(nn.Flatten(), nn.Dropout(.2))
    return m

def reseed(learn, s):
    for dl in learn.dls.loaders: dl.rng = random.Random(s)
    seed(s)

def make(path, s, loss, opt='sgd'):
    "Nothing is shared with another call but the teacher's weights"
    kd = KD(net(8, s=1), losses[loss]() if isinstance(loss, str) else loss)
    learn = learner(student(), get_dls(), opt_func=opts[opt], path=path, cbs=[kd,Noise()])
    reseed(learn, s)
    return learn

def train(learn, cbs, at=None, n=4):
    "A fit, stopped before the batch `at`, an epoch and its batch"
    def stop(l):
        if l.training and (l.epoch,l.iter)==at: raise Stop
    if at is None: learn.fit_one_cycle(n, .05, cbs=cbs)
    else:
        with pytest.raises(Stop): learn.fit_one_cycle(n, .05, cbs=[*cbs,At('before_batch', stop)])
    assert left(learn, learn.knowledge_distillation.teacher.model)==[]
    return learn

def stopped(path, loss, opt='sgd', *more):
    "A fit with a checkpoint that ends in its third epoch; the checkpoint's file"
    train(make(path, 0, loss, opt), [Checkpoint('run'),*more], at=(2,1))
    return path/'models'/'run.pth'

def resumed(path, loss, opt='sgd', *more):
    "Another that goes on from there"
    return train(make(path, 7, loss, opt), [Checkpoint('run', resume=True),*more])

def generators():
    "Their states, as tensors"
    return dict(rng=torch.get_rng_state(), numpy=torch.tensor(np.random.get_state()[1].astype(np.int64)),
                random=torch.tensor(random.getstate()[1]))

def in_optimizer(learn):
    "What the optimizer knows of the student's parameters, then of the learned parts"
    yield from (learn.opt.state[p] for p in learn.model.parameters())
    yield from (known[0] for known in learn.knowledge_distillation.state_dict()['opt'])

def everything(learn):
    res = {f'model.{k}': v for k,v in state(learn.model).items()}
    res |= {f'loss.{k}': v for k,v in state(learn.knowledge_distillation.loss).items()}
    for i,o in enumerate(in_optimizer(learn)): res |= {f'opt.{i}.{k}': torch.as_tensor(v) for k,v in o.items()}
    res['losses'] = torch.tensor([float(o) for o in learn.recorder.losses])
    res['lrs'] = torch.tensor(learn.recorder.lrs, dtype=torch.float64)
    res['loader'] = torch.tensor(learn.dls.train.rng.getstate()[1])
    return res|generators()

def rows(learn): return [list(r) for r in learn.recorder.values],learn.knowledge_distillation.history

clipped,accumulated = partial(GradientClip, .1),partial(GradientAccumulation, 128)

@pytest.mark.parametrize('loss,opt,more', [
    ('fitnet','sgd',()), ('fitnet','adam',()), ('fitnet','torch',()), ('fcfd','sgd',()), ('share','adam',()),
    ('crd','sgd',()), ('fitnet','sgd',(MixUp,)), ('fitnet','sgd',(clipped,)), ('fcfd','adam',(accumulated,))])
def test_equals_the_uninterrupted_fit(tmp_path, loss, opt, more):
    whole = train(make(tmp_path, 0, loss, opt), [f() for f in more])
    want = everything(whole)
    stopped(tmp_path, loss, opt, *(f() for f in more))
    again = resumed(tmp_path, loss, opt, *(f() for f in more))
    assert_same(everything(again), want)
    assert rows(again)==rows(whole)
    assert again.recorder.iters==whole.recorder.iters
    assert again.train_iter==whole.train_iter

@pytest.mark.parametrize('lost', ['rng','opt','learned','draws','model','moments'])
def test_all_of_it_is_needed(tmp_path, lost):
    "The comparison can fail: each part of the file alone makes a difference"
    whole = train(make(tmp_path, 0, 'fcfd'), [])
    f = stopped(tmp_path, 'fcfd')
    st,other = torch.load(f),make(tmp_path, 7, 'fcfd')
    train(other, [], n=1)
    kd = other.knowledge_distillation.state_dict()
    if lost=='rng': st['rng']['torch_state'] = torch.get_rng_state()
    elif lost=='opt': st['opt']['state'] = [{k:v for k,v in o.items() if k!='grad_avg'} for o in st['opt']['state']]
    elif lost=='moments': st['kds'][0]['opt'] = [None for _ in kd['opt']]
    elif lost=='model': st['model']['layer1.1.running_mean'] += 1e-3
    else: st['kds'][0][lost] = kd[lost]
    torch.save(st, f)
    a,b = state(resumed(tmp_path, 'fcfd').model),state(whole.model)
    assert not all(torch.equal(a[k], b[k]) for k in a)

def test_writing_changes_nothing(tmp_path):
    written = everything(train(make(tmp_path, 0, 'fcfd'), [Checkpoint('run')]))
    assert_same(written, everything(train(make(tmp_path, 0, 'fcfd'), [])))

script = '''
import sys; sys.path.insert(0, sys.argv[1])
from test_resume import *
learn = train(make(sys.argv[2], 11, 'fcfd'), [Checkpoint('run', resume=True)])
torch.save(everything(learn), sys.argv[2]+'/res.pth')
'''
@pytest.mark.slow
def test_in_a_new_process(tmp_path):
    whole = everything(train(make(tmp_path, 0, 'fcfd'), []))
    stopped(tmp_path, 'fcfd')
    here = os.path.dirname(__file__)
    paths = [*filter(None, [os.environ.get('PYTHONPATH')]),os.path.dirname(here),here]
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(paths), 'PYTHONHASHSEED':'5'}
    cmd = [sys.executable, '-W', 'ignore', '-c', script, here, str(tmp_path)]
    r = subprocess.run(cmd, capture_output=True, text=True, env=env)
    assert r.returncode==0, r.stderr
    assert_same(torch.load(tmp_path/'res.pth'), whole)

def test_without_distillation(tmp_path):
    def run(s, *cbs):
        learn = learner(student(), get_dls(), path=tmp_path)
        reseed(learn, s)
        learn.fit_one_cycle(3, .05, cbs=cbs)
        return state(learn.model)
    whole = run(0)
    with pytest.raises(Stop): run(0, Checkpoint(), At('before_validate', raising(Stop), skip=1))
    assert_same(run(3, Checkpoint(resume=True)), whole)

def test_with_fastais_trackers(tmp_path):
    "The best so far and the patience are the whole fit's; epochs already done neither save again nor count twice"
    def trackers(name):
        return [SaveModelCallback(fname=name, with_opt=True), EarlyStoppingCallback(patience=3),
                ReduceLROnPlateau(patience=1, min_delta=10.)]
    def fit(s, *cbs):
        learn = make(tmp_path, s, 'fitnet', 'adam')
        try: learn.fit(6, .03, cbs=cbs)
        except Stop: pass
        return learn
    a,b = trackers('a'),trackers('b')
    whole = fit(0, *a)
    fit(0, *trackers('b'), Checkpoint('run'), At('before_train', raising(Stop), skip=3))
    again = fit(7, *b, Checkpoint('run', resume=True))
    assert rows(again)==rows(whole)
    assert len(set(whole.recorder.lrs))>1
    assert again.recorder.lrs==whole.recorder.lrs
    for p,q in zip(a, b):
        assert p.best==q.best
        assert vars(p).get('wait')==vars(q).get('wait')
    assert_same(state(again.model), state(whole.model))
    assert_same(*(state(o.knowledge_distillation.loss) for o in (again,whole)))

def test_finished_auto_and_other_fits(tmp_path):
    whole = train(make(tmp_path, 0, 'fitnet'), [Checkpoint('run', resume='auto')])
    before = generators()
    done = train(make(tmp_path, 7, 'fitnet'), [Checkpoint('run', resume='auto')])      # nothing left to do
    assert_same(generators(), before)
    assert_same(state(done.model), state(whole.model))
    assert rows(done)==rows(whole)
    assert done.recorder.losses==[float(o) for o in whole.recorder.losses]
    for l in (whole,done):                                                              # a second fit
        seed(5)
        l.fit(1, .01)
    assert_same(state(done.model), state(whole.model))
    assert_same(state(done.knowledge_distillation.loss), state(whole.knowledge_distillation.loss))

def test_validate_predict_and_lr_find_leave_the_file_alone(tmp_path):
    f = stopped(tmp_path, 'fitnet')
    was,learn = f.read_bytes(),make(tmp_path, 7, 'fitnet')
    before,cb = state(learn.model),Checkpoint('run', resume=True)
    learn.add_cb(cb)
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=3, show_plot=False)
    assert f.read_bytes()==was
    assert cb.resume is True
    assert_same(state(learn.model), before)
    learn.fit_one_cycle(4, .05)
    assert_same(state(learn.model), state(train(make(tmp_path, 0, 'fitnet'), []).model))

def first_layer_apart(m):
    rest = [p for n,p in m.named_parameters() if not n.startswith('layer1')]
    return [list(m.layer1.parameters()),rest]

def test_fits_after_one_another(tmp_path):
    "Each phase of a fine-tuning with a file of its own"
    def phases(s, stop=None):
        learn = make(tmp_path, s, 'fitnet')
        learn.splitter = first_layer_apart
        learn.freeze()
        learn.fit_one_cycle(1, .05, cbs=Checkpoint('a', resume='auto'))
        learn.unfreeze()
        return train(learn, [Checkpoint('b', resume='auto')], at=stop, n=3)
    whole = everything(phases(0))
    for n in 'ab': (tmp_path/'models'/f'{n}.pth').unlink()
    phases(0, (1,2))
    assert_same(everything(phases(9)), whole)

class Killed(Exception): ...
def half(o, file):
    "Writes something, and dies"
    with open(file, 'wb') as f: f.write(b'half')
    raise Killed('disk full')

def test_a_write_that_dies_leaves_the_file_before(tmp_path, monkeypatch):
    f = stopped(tmp_path, 'fitnet')
    was = f.read_bytes()
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(Killed): make(tmp_path, 0, 'fitnet').fit(1, cbs=Checkpoint('run'))
    assert f.read_bytes()==was

other_layers = TaskLoss()+SoftTarget()+ramp(3)*FitNet().at(['layer1','layer3'])
wrong = dict(                                          # what is another than in the file, and what is said
    loss=(dict(loss='fcfd'), r'the file is of the loss .*FitNet\(\).*, here it is .*FCFD\(\)'),
    layers=(dict(loss=other_layers), 'the file is of the loss'),
    epochs=(dict(n=5), 'a fit with epochs = 4, here it is 5'),
    student=(dict(model=lambda: net(5)),
             r"the model in .* does not fit: \d+ entries differ, the first is 'layer1.0.weight', "
             r"\(4, 1, 3, 3\) in the file and \(5, 1, 3, 3\) here"),
    teacher=(dict(teacher=lambda: net(6, s=1)),
             r"what .*FitNet\(\).* learned does not fit: .* in the file and .* here"),
    optimizer=(dict(opt='torch'), 'the optimizer in .* is not this one'),
    no_teacher=(dict(kd=False), 'a fit with teachers = 1, here it is 0'),
    missing=(dict(fname='runn'), 'there is no checkpoint .*runn.pth'))

def another(path, loss='fitnet', opt='sgd', model=None, teacher=None, kd=True, **fit):
    "A Learner that differs in what is said, and its callback"
    learn = make(path, 7, loss, opt)
    cb = learn.knowledge_distillation
    if model: learn.model = model()
    if teacher: cb.teacher.model = teacher()
    if not kd: learn.remove_cb(cb)
    return learn,cb

@pytest.mark.parametrize('name', wrong)
def test_a_wrong_file(tmp_path, name):
    change,match = wrong[name]
    f = stopped(tmp_path, 'fitnet')
    file = f.read_bytes()
    learn,kd = another(tmp_path, **change)
    before,n,cb = state(learn.model),change.get('n', 4),Checkpoint(change.get('fname', 'run'), resume=True)
    with pytest.raises((ValueError,FileNotFoundError), match=match): learn.fit_one_cycle(n, .05, cbs=cb)
    if name!='teacher': assert_same(state(learn.model), before)
    assert left(learn, kd.teacher.model)==[]
    assert f.read_bytes()==file
    with pytest.raises(ValueError, match="expected True, False or 'auto'"): Checkpoint(resume='yes')

def test_a_copied_learner_checkpoints_by_itself(tmp_path):
    learn = learner(path=tmp_path, cbs=Checkpoint('both'))
    twin = copy.deepcopy(learn)
    twin.fit(1)
    assert twin.checkpoint.learn is twin
    assert learn.checkpoint.learn is learn
    assert (tmp_path/'models'/'both.pth').exists()
