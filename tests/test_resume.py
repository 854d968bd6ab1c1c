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
from common import KD,At,assert_same,get_dls,learner,left,net,seed,state
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.optimizer import Adam,OptimWrapper,SGD
from torch import nn

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import TaskLoss,ramp
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import SoftTarget

torch.set_num_threads(1)

class Stop(Exception): ...
class Noise(Callback):
    "Draws from all three global generators"
    run_valid = False
    def before_batch(self): self.learn.xb = (self.xb[0]*(1+.1*np.random.rand()+.1*random.random())+.1*torch.randn(1),)

losses = dict(fitnet=lambda: TaskLoss()+SoftTarget()+ramp(3)*FitNet().at(['layer2','layer3']), fcfd=lambda: TaskLoss()+FCFD(), share=lambda: FitNet().at('layer3'))
opts = dict(sgd=partial(SGD, mom=.9), adam=Adam, torch=partial(OptimWrapper, opt=torch.optim.AdamW))

def student(): m = net(); m.flat = nn.Sequential(nn.Flatten(), nn.Dropout(.2)); return m

def make(path, s, loss, opt='sgd'):
    "Nothing is shared with another call but the teacher's weights"
    learn = learner(student(), get_dls(), opt_func=opts[opt], path=path, cbs=[KD(net(8, s=1), losses[loss]() if isinstance(loss, str) else loss),Noise()])
    for dl in learn.dls.loaders: dl.rng = random.Random(s)
    seed(s)
    return learn

def train(learn, cbs, at=None, n=4):
    def stop(l): raise Stop('now')
    cbs = [*cbs,*([] if at is None else [At('before_batch', lambda l: stop(l) if l.training and (l.epoch,l.iter)==at else None)])]
    if at is None: learn.fit_one_cycle(n, .05, cbs=cbs)
    else:
        with pytest.raises(Stop): learn.fit_one_cycle(n, .05, cbs=cbs)
    assert left(learn, learn.knowledge_distillation.teacher.model)==[]
    return learn

def everything(learn):
    kd = learn.knowledge_distillation
    res = {**{f'model.{k}':v for k,v in state(learn.model).items()}, **{f'loss.{k}':v for k,v in state(kd.loss).items()}}
    for i,(p,o) in enumerate([*((p, learn.opt.state[p]) for p in learn.model.parameters()), *((p, kd._s.opt_state[p][0]) for p in kd.loss.parameters())]):
        res.update({f'opt.{i}.{k}': torch.as_tensor(v) for k,v in o.items()})
    res['losses'] = torch.tensor([float(o) for o in learn.recorder.losses]); res['lrs'] = torch.tensor(learn.recorder.lrs, dtype=torch.float64)
    res['rng'] = torch.get_rng_state(); res['numpy'] = torch.tensor(np.random.get_state()[1].astype(np.int64)); res['random'] = torch.tensor(random.getstate()[1])
    res['loader'] = torch.tensor(learn.dls.train.rng.getstate()[1])
    return res

def rows(learn): return [[o for o in r] for r in learn.recorder.values],kd_history(learn)
def kd_history(learn): return learn.knowledge_distillation.history

@pytest.mark.parametrize('loss,opt,more', [('fitnet','sgd',()),('fitnet','adam',()),('fitnet','torch',()),('fcfd','sgd',()),('share','adam',()),('fitnet','sgd',(MixUp,)),('fitnet','sgd',(partial(GradientClip, .1),)),('fcfd','adam',(partial(GradientAccumulation, 128),))])
def test_equals_the_uninterrupted_fit(tmp_path, loss, opt, more):
    whole = train(make(tmp_path, 0, loss, opt), [f() for f in more]); want = everything(whole)
    train(make(tmp_path, 0, loss, opt), [Checkpoint('run'),*(f() for f in more)], at=(2,1))
    again = train(make(tmp_path, 7, loss, opt), [Checkpoint('run', resume=True),*(f() for f in more)])
    assert_same(everything(again), want)
    assert rows(again)==rows(whole) and again.recorder.iters==whole.recorder.iters and again.train_iter==whole.train_iter

@pytest.mark.parametrize('lost', ['rng','opt','learned','draws','model','moments'])
def test_all_of_it_is_needed(tmp_path, lost):
    "The comparison can fail: each part of the file alone makes a difference"
    whole = train(make(tmp_path, 0, 'fcfd'), [])
    train(make(tmp_path, 0, 'fcfd'), [Checkpoint('run')], at=(2,1))
    f = tmp_path/'models'/'run.pth'
    st,other = torch.load(f),make(tmp_path, 7, 'fcfd')
    train(other, [], n=1)
    kd = other.knowledge_distillation.state_dict()
    if lost=='rng': st['rng']['torch_state'] = torch.get_rng_state()
    elif lost=='opt': st['opt']['state'] = [{k:v for k,v in o.items() if k!='grad_avg'} for o in st['opt']['state']]
    elif lost=='moments': st['kds'][0]['opt'] = [None for _ in kd['opt']]
    elif lost=='model': st['model']['layer1.1.running_mean'] += 1e-3
    else: st['kds'][0][lost] = kd[lost]
    torch.save(st, f)
    a,b = state(train(make(tmp_path, 7, 'fcfd'), [Checkpoint('run', resume=True)]).model),state(whole.model)
    assert not all(torch.equal(a[k], b[k]) for k in a)

def test_writing_changes_nothing(tmp_path):
    assert_same(everything(train(make(tmp_path, 0, 'fcfd'), [Checkpoint('run')])), everything(train(make(tmp_path, 0, 'fcfd'), [])))

script = '''
import sys; sys.path.insert(0, sys.argv[1])
from test_resume import *
learn = train(make(sys.argv[2], 11, 'fcfd'), [Checkpoint('run', resume=True)])
torch.save(everything(learn), sys.argv[2]+'/res.pth')
'''
@pytest.mark.slow
def test_in_a_new_process(tmp_path):
    whole = everything(train(make(tmp_path, 0, 'fcfd'), []))
    train(make(tmp_path, 0, 'fcfd'), [Checkpoint('run')], at=(2,1))
    here = os.path.dirname(__file__)
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, here, str(tmp_path)], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join(['.',here]), 'PYTHONHASHSEED': '5'})
    assert r.returncode==0, r.stderr
    assert_same(torch.load(tmp_path/'res.pth'), whole)

def test_without_distillation(tmp_path):
    def run(s, *cbs, n=3):
        learn = learner(student(), get_dls(), path=tmp_path); seed(s)
        for dl in learn.dls.loaders: dl.rng = random.Random(s)
        learn.fit_one_cycle(n, .05, cbs=cbs); return state(learn.model)
    def stop(l): raise Stop('now')
    whole = run(0)
    with pytest.raises(Stop): run(0, Checkpoint(), At('before_validate', stop, skip=1))
    assert_same(run(3, Checkpoint(resume=True)), whole)

def test_with_fastais_trackers(tmp_path):
    "The best so far, and the patience, are those of the whole fit; epochs already done neither save the model again nor count twice"
    def cbs(name): return [SaveModelCallback(fname=name, with_opt=True),EarlyStoppingCallback(patience=3),ReduceLROnPlateau(patience=1, min_delta=10.)]
    def fit(s, cbs, at=None):
        learn = make(tmp_path, s, 'fitnet', 'adam')
        def stop(l): raise Stop('now')
        try: learn.fit(6, .03, cbs=[*cbs,*([] if at is None else [At('before_train', stop, skip=at)])])
        except Stop: pass
        return learn
    a = cbs('a'); whole = fit(0, a)
    fit(0, [*cbs('b'),Checkpoint('run')], at=3)
    b = cbs('b'); again = fit(7, [*b,Checkpoint('run', resume=True)])
    assert rows(again)==rows(whole) and len(set(whole.recorder.lrs))>1 and again.recorder.lrs==whole.recorder.lrs
    for p,q in zip(a, b): assert p.best==q.best and vars(p).get('wait')==vars(q).get('wait')
    assert_same(state(again.model), state(whole.model))

def test_finished_auto_and_other_fits(tmp_path):
    whole = train(make(tmp_path, 0, 'fitnet'), [Checkpoint('run', resume='auto')])
    rng = [torch.get_rng_state(),np.random.get_state()[1],random.getstate()]
    learn = make(tmp_path, 7, 'fitnet')
    done = train(learn, [Checkpoint('run', resume='auto')])                     # nothing left to do
    assert torch.equal(torch.get_rng_state(), rng[0]) and (np.random.get_state()[1]==rng[1]).all() and random.getstate()==rng[2]
    assert_same(state(done.model), state(whole.model)); assert rows(done)==rows(whole) and done.recorder.losses==[float(o) for o in whole.recorder.losses]
    for l in (whole,done): seed(5); l.fit(1, .01)                               # a second fit
    assert_same(state(done.model), state(whole.model)); assert_same(state(done.knowledge_distillation.loss), state(whole.knowledge_distillation.loss))

def test_validate_predict_and_lr_find_leave_the_file_alone(tmp_path):
    train(make(tmp_path, 0, 'fitnet'), [Checkpoint('run')], at=(2,1))
    f = tmp_path/'models'/'run.pth'
    was,learn = f.read_bytes(),make(tmp_path, 7, 'fitnet')
    before,cb = state(learn.model),Checkpoint('run', resume=True)
    learn.add_cb(cb); learn.validate(); learn.get_preds()
    learn.lr_find(num_it=3, show_plot=False)
    assert f.read_bytes()==was and cb.resume is True
    assert_same(state(learn.model), before)
    learn.fit_one_cycle(4, .05)
    ref = train(make(tmp_path, 0, 'fitnet'), [])
    assert_same(state(learn.model), state(ref.model))

def test_fits_after_one_another(tmp_path):
    "Each phase of a fine-tuning with a file of its own"
    def phases(s, stop=None):
        learn = make(tmp_path, s, 'fitnet')
        learn.splitter = lambda m: [list(m.layer1.parameters()),[p for n,p in m.named_parameters() if not n.startswith('layer1')]]
        learn.freeze(); learn.fit_one_cycle(1, .05, cbs=Checkpoint('a', resume='auto'))
        learn.unfreeze(); train(learn, [Checkpoint('b', resume='auto')], at=stop, n=3)
        return learn
    whole = everything(phases(0)); (tmp_path/'models'/'a.pth').unlink(); (tmp_path/'models'/'b.pth').unlink()
    phases(0, (1,2))
    assert_same(everything(phases(9)), whole)

class Killed(Exception): ...
def test_a_write_that_dies_leaves_the_file_before(tmp_path, monkeypatch):
    train(make(tmp_path, 0, 'fitnet'), [Checkpoint('run')], at=(2,1))
    f = tmp_path/'models'/'run.pth'; was = f.read_bytes()
    def half(o, file): open(file, 'wb').write(b'half'); raise Killed('disk full')
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(Killed): make(tmp_path, 0, 'fitnet').fit(1, cbs=Checkpoint('run'))
    assert f.read_bytes()==was

wrong = dict(
    loss=(dict(loss='fcfd'), {}, r'the file is of the loss .*FitNet\(\).*, here it is .*FCFD\(\)'),
    layers=(dict(loss=TaskLoss()+SoftTarget()+ramp(3)*FitNet().at(['layer1','layer3'])), {}, 'the file is of the loss'),
    epochs=({}, dict(n=5), 'a fit with epochs = 4, here it is 5'),
    student=(dict(model=lambda: net(5)), {}, r"the model in .* does not fit: \d+ entries differ, the first is 'layer1.0.weight', \(4, 1, 3, 3\) in the file and \(5, 1, 3, 3\) here"),
    teacher=(dict(teacher=lambda: net(6, s=1)), {}, r"what .*FitNet\(\).* learned does not fit: .* in the file and .* here"),
    optimizer=(dict(opt='torch'), {}, 'the optimizer in .* is not this one'),
    no_teacher=(dict(kd=False), {}, 'a fit with teachers = 1, here it is 0'),
    missing=({}, dict(fname='runn'), 'there is no checkpoint .*runn.pth'))

@pytest.mark.parametrize('name', wrong)
def test_a_wrong_file(tmp_path, name):
    change,fit,match = wrong[name]
    train(make(tmp_path, 0, 'fitnet'), [Checkpoint('run')], at=(2,1))
    file = (tmp_path/'models'/'run.pth').read_bytes()
    learn = make(tmp_path, 7, change.get('loss', 'fitnet'), change.get('opt', 'sgd'))
    kd = learn.knowledge_distillation
    if 'model' in change: learn.model = change['model']()
    if 'teacher' in change: kd.teacher.model = change['teacher']()
    if not change.get('kd', True): learn.remove_cb(kd)
    before = state(learn.model)
    with pytest.raises((ValueError,FileNotFoundError), match=match): learn.fit_one_cycle(fit.get('n', 4), .05, cbs=Checkpoint(fit.get('fname', 'run'), resume=True))
    if name!='teacher': assert_same(state(learn.model), before)
    assert left(learn, kd.teacher.model)==[] and (tmp_path/'models'/'run.pth').read_bytes()==file
    with pytest.raises(ValueError, match="expected True, False or 'auto'"): Checkpoint(resume='yes')

def test_a_copied_learner_checkpoints_by_itself(tmp_path):
    learn = learner(path=tmp_path, cbs=Checkpoint('both'))
    twin = copy.deepcopy(learn)
    twin.fit(1)
    assert twin.checkpoint.learn is twin and learn.checkpoint.learn is learn and (tmp_path/'models'/'both.pth').exists()
