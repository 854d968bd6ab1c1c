"A teacher that follows the student: its numbers by the formula, and all that a teacher that changes must live through"
import copy
from functools import partial

import numpy as np
import pytest
import torch
from common import (KD,At,HalfCPU,Out,Watch,asked,assert_close,assert_same,flags,get_dls,in_float64,learner,left,net,
                    raising,refuses,seed,state)
from fastai.callback.core import CancelStepException
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (a method of Learner)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam,SGD
from torch import nn

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses import FCFD,Attention,FitNet,Logits,SoftTarget
from fasterdistill.teachers import EMA,Ensemble,Teacher,running_mean,slow_start

def params(m): return {n: p.detach().clone() for n,p in m.named_parameters()}
def norms(m): return {n: b.clone() for n,b in m.named_buffers() if 'running' in n}

def taught(ema, loss=None, model=None, cbs=(), **kwargs):
    loss = TaskLoss()+SoftTarget(T=1) if loss is None else loss
    return learner(model, get_dls(n=96, bs=32), cbs=[KD(ema, loss),*cbs], metrics=[], **kwargs)

class Steps:
    "The student's parameters and averages before the fit and after each step"
    def __init__(self, learn): self.params,self.norms = [params(learn.model)],[norms(learn.model)]
    def __call__(self, learn):
        if not learn.training: return
        self.params.append(params(learn.model))
        self.norms.append(norms(learn.model))

def followed(walk, decay):
    "The formula, tensor by tensor"
    res = dict(walk[0])
    for t,now in enumerate(walk[1:], 1): res = {n: decay(t)*v+(1-decay(t))*now[n] for n,v in res.items()}
    return res

# ---- its numbers ----

@in_float64
@pytest.mark.parametrize('warmup', [None,running_mean,slow_start])
@pytest.mark.parametrize('buffers', ['copy','average'])
def test_equals_the_formula(warmup, buffers):
    ema = EMA(.7, warmup, buffers)
    learn = taught(ema)
    steps = Steps(learn)
    learn.fit(2, cbs=At('after_batch', steps))
    assert len(steps.params)==7
    rule = dict(copy=None, average=steps.norms)[buffers]
    def decay(t): return .7 if warmup is None else min(.7, warmup(t))
    assert_close(params(ema.model), followed(steps.params, decay))
    assert_close(norms(ema.model), steps.norms[-1] if rule is None else followed(rule, decay))
    counts = [int(b) for n,b in ema.model.named_buffers() if 'tracked' in n]
    assert counts==[6]*3
    assert left(learn)==[]

@in_float64
def test_says_what_the_average_says():
    "On each batch the average of the steps before, in evaluation mode and without a graph"
    said,averages = [],[]
    class Heard(DistillLoss):
        def forward(self, pred, teacher_pred, xb):
            assert not teacher_pred.requires_grad
            said.append((xb[0],teacher_pred))
            return (pred-teacher_pred).pow(2).mean()
    ema = EMA(.5)
    learn = taught(ema, TaskLoss()+Heard())
    first = copy.deepcopy(learn.model)
    learn.fit(1, cbs=At('after_batch', lambda l: l.training and averages.append(copy.deepcopy(ema.model))))
    assert len(said)==4                                          # the trial, and three batches
    for (x,t),m in zip(said[1:], [first,*averages[:-1]], strict=True):
        with torch.no_grad(): assert torch.equal(t, m.eval()(x))

def test_a_step_is_one_of_the_optimizer():
    for cb,n in ((GradientAccumulation(64),1),(At('before_step', raising(CancelStepException())),0)):
        ema = EMA(.5)
        learn = taught(ema)
        was = params(learn.model)
        learn.fit(1, cbs=cb)
        assert ema.average.steps==n
        if n==0: assert_same(params(ema.model), was)

def test_mixed_precision():
    "The average is float32, and is asked under the student's autocast"
    kinds = []
    ema = EMA(.5)
    learn = taught(ema, cbs=[HalfCPU()])
    def watch(learn):
        if learn.training and not kinds: ema.model.fc.register_forward_hook(lambda m, a, o: kinds.append(o.dtype))
    learn.fit(1, cbs=At('before_batch', watch, order=70))
    assert set(kinds)=={torch.bfloat16} and len(kinds)==3
    assert {p.dtype for p in ema.model.parameters()}=={torch.float32}

def test_what_is_infinite_stays_so():
    "A mask of -inf, which a formula would make NaN of"
    m = net()
    m.fc.register_buffer('mask', torch.full((3,), -torch.inf))
    ema = EMA(.5, buffers='average')
    taught(ema, model=m).fit(1)
    assert torch.equal(ema.model.fc.mask, m.fc.mask)

# ---- losses that read its layers ----

@pytest.mark.parametrize('loss', [FitNet,Attention,FCFD,Logits,lambda: FitNet().at('layer2')])
def test_losses_read_its_layers(loss):
    seen,ema = [],EMA(.5)
    learn = taught(ema, TaskLoss()+loss())
    learn.fit(2, cbs=At('before_batch', lambda l: l.training and seen.append(flags(ema.model))))
    assert all(not any(wants) and not any(training) for wants,training in seen)
    wants,training = flags(ema.model)
    assert all(wants) and not any(training)
    assert all(p.grad is None for p in ema.model.parameters())
    assert left(learn)==[]
    assert not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for m in ema.model.modules())

def test_a_teacher_without_layers_is_refused_still():
    with pytest.raises(ValueError, match='reads the layers of one network'): KD([net(),net()], TaskLoss()+FitNet())
    with pytest.raises(ValueError, match='reads the layers of one network'): KD([EMA(),EMA()], TaskLoss()+FitNet())

def test_the_student_answers_with_a_tuple():
    "Where the prediction is, is said once, on the callback"
    ema = EMA(.5)
    model = Out(net(), lambda z: (z*0,z))
    def second(pred, *yb): return nn.functional.cross_entropy(pred[1], yb[0])
    said = []
    class Heard(DistillLoss):
        def forward(self, pred, teacher_pred, xb):
            said.append(teacher_pred)
            assert torch.equal(teacher_pred, asked(ema.model, *xb)[1])
            return (pred-teacher_pred).pow(2).mean()
    learn = learner(model, get_dls(n=96, bs=32), cbs=KD(ema, Heard(), output=1), loss_func=second, metrics=[])
    learn.fit(1)
    assert len(said)==4

def test_a_frozen_body_and_fine_tune():
    "Its flags are the student's of the last fit"
    ema = EMA(.5)
    learn = taught(ema, TaskLoss()+FitNet().at('layer3'), splitter=lambda m: [list(m.layer1.parameters()),
                   [p for k in ('layer2','layer3','fc') for p in getattr(m, k).parameters()]])
    learn.freeze()
    learn.fit(1)
    assert not any(p.requires_grad for p in ema.model.layer1[0].parameters())
    assert_same(params(ema.model.layer1[0]), params(learn.model.layer1[0]))
    learn.unfreeze()
    learn.fit(1)
    assert ema.average.steps==6 and all(p.requires_grad for p in ema.model.parameters())

# ---- from fit to fit ----

def test_two_fits_go_on():
    "As one: the average and its warm-up"
    def run(*epochs):
        ema = EMA(.9)
        learn = taught(ema, opt_func=partial(SGD, mom=0.))
        for n in epochs:
            seed(len(epochs)*n)
            learn.fit(n)
        return ema
    ema = run(2, 1)
    assert ema.average.steps==9
    model = ema.model
    assert run(1).average.steps==3
    assert ema.model is model

def test_weights_loaded_between_fits_are_seen():
    ema = EMA(.9)
    learn = taught(ema)
    learn.fit(1)
    made = ema.model
    learn.model.load_state_dict(net(s=5).state_dict())
    seen = []
    learn.fit(1, cbs=At('before_batch', lambda l: l.training and seen.append(params(ema.model)), order=70))
    assert_same(seen[0], params(net(s=5)))
    assert ema.average.steps==3 and ema.model is made            # parts learned with it stay right

def test_the_best_student_is_put_back(tmp_path):
    "What SaveModelCallback loads at the end is no reason to begin anew"
    ema = EMA(.9)
    learn = learner(None, get_dls(n=96, bs=32), cbs=KD(ema, TaskLoss()+SoftTarget()), path=tmp_path)
    learn.fit(2, cbs=SaveModelCallback(monitor='valid_loss', comp=np.greater)) # the worst, which is not the last
    learn.fit(1)
    assert ema.average.steps==9

def test_plan_leaves_it_alone():
    ema = EMA(.5)
    learn = taught(ema, TaskLoss()+FitNet())
    plan = learn.knowledge_distillation.plan()
    assert 'EMA(0.5)' in repr(plan) and ema.model is None
    assert plan.sizes[1]==sum(p.numel() for p in learn.model.parameters())
    assert not any('of the loss at the start' in o for o in plan.advice)         # it is the student, at the start
    learn.model.load_state_dict(net(s=5).state_dict())
    seen = []
    learn.fit(1, cbs=At('before_batch', lambda l: l.training and seen.append(state(ema.model)), order=70))
    assert_same(seen[0], state(net(s=5)))
    was,model = state(ema.model),ema.model
    learn.model.load_state_dict(net(s=7).state_dict())
    learn.knowledge_distillation.plan()
    assert ema.model is model and ema.average.steps==3
    assert_same(state(ema.model), was)

@pytest.mark.parametrize('before', [False,True])
def test_lr_find_does_not_move_it(before, tmp_path):
    ema = EMA(.5)
    learn = taught(ema, TaskLoss()+FitNet().at('layer3'), path=tmp_path)
    if before: learn.fit(1)
    was = copy.deepcopy(ema.state_dict())
    learn.lr_find(num_it=8, show_plot=False)
    assert ema.average is None if not before else ema.average.steps==3
    if before: assert_same(state(ema.model), was['model'])
    learn.fit(1)                                                 # with the parts that lr_find has made
    assert ema.average.steps==(6 if before else 3)

def test_lr_find_lets_a_loss_meet_another(tmp_path):
    "What is put back has not learned: another student may have it"
    loss = TaskLoss()+FitNet().at('layer3')
    first = learner(net(), get_dls(), cbs=KD(net(8, s=1), loss), path=tmp_path, metrics=[])
    first.lr_find(num_it=4, show_plot=False)
    second = learner(net(s=2), get_dls(), cbs=KD(net(8, s=1), loss), path=tmp_path, metrics=[])
    second.fit(1)
    third = learner(net(s=3), get_dls(), cbs=KD(net(8, s=1), loss), path=tmp_path, metrics=[])
    refuses(third, 'trained with another')

def test_a_copied_learner_has_its_own():
    "It goes on as the other would, and neither disturbs the other; a frozen teacher is shared"
    ema = EMA(.5)
    learn = taught(Ensemble([ema,net(6, s=1)]), opt_func=Adam)
    learn.fit(1)
    twin = copy.deepcopy(learn)
    frozen,mine = learn.knowledge_distillation.teacher.teachers[1],twin.knowledge_distillation.teacher.teachers
    assert mine[1] is frozen and mine[0] is not ema
    was = state(ema.model)
    seed(3)
    twin.fit(1)
    assert_same(state(ema.model), was)
    seed(3)
    learn.fit(1)
    assert ema.average.steps==mine[0].average.steps==6
    assert_same(state(mine[0].model), state(ema.model))

def test_copied_within_a_fit():
    ema,twins = EMA(.5),[]
    learn = taught(ema)
    learn.fit(2, cbs=At('after_epoch', lambda l: twins.append(copy.deepcopy(l)), skip=0))
    twin = twins[0].knowledge_distillation.teacher
    assert twin.average.steps==3
    twins[0].remove_cb(At)
    twins[0].fit(1)
    assert twin.average.steps==6 and all(p.requires_grad for p in twin.model.parameters())
    assert left(learn)==[]

def test_another_student_is_another_average():
    "What was found out about the old one is not taken for the new one's"
    ema = EMA(.5)
    loss = TaskLoss()+Attention().at('layer2')
    taught(ema, loss).fit(1)
    old = ema.model
    learn = taught(ema, loss, net(6, s=3))
    learn.fit(1)
    assert ema.model is not old and ema.model.fc.in_features==24 and ema.average.steps==3

    widths = []
    kd = KD(EMA(.5), TaskLoss()+Watch(lambda fm_t, **_: widths.append([z.shape[1] for z in fm_t.values()])))
    learn = learner(net(), get_dls(), cbs=kd, metrics=[])
    learn.fit(1)
    assert widths==[[4,8,16]]*4
    learn.model = net(6, s=3)
    learn.create_opt()
    learn.fit(1)
    assert widths[4:]==[[6,12,24]]*4
    assert kd.findings['teacher'].of[0][0][1] is kd.teacher.model

# ---- whatever happens ----

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','after_step'])
def test_flags_come_back(event):
    ema = EMA(.5)
    learn = taught(ema, TaskLoss()+FitNet().at('layer2'))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At(event, raising(KeyboardInterrupt()), skip=1))
    wants,training = flags(ema.model)
    assert all(wants) and not any(training) and left(learn)==[]
    assert not any(m._forward_hooks for m in ema.model.modules())
    ema.model.train()                                            # a user's own
    learn.fit(1)
    assert all(flags(ema.model)[1])

def test_hooks_are_not_copied():
    "The statistics that somebody takes of the student are of the student"
    model,seen = net(),[]
    model.layer1.register_forward_hook(lambda m, a, o: seen.append(m))
    learn = taught(EMA(.5), TaskLoss()+Attention(), model)
    learn.fit(1)
    assert set(seen)=={model.layer1}
    assert len(model.layer1._forward_hooks)==1

def test_compiled_in_place():
    model = net()
    model.compile(backend='eager')
    ema = EMA(.5)
    taught(ema, model=model).fit(1)
    assert ema.average.steps==3

def test_what_cannot_be_averaged():
    refuses(taught(EMA(.5), model=net().bfloat16()), 'in half precision, where the small steps')
    def prune(learn):
        conv = learn.model.layer3[0]
        conv.weight,conv.bias = nn.Parameter(conv.weight[:8].detach()),nn.Parameter(conv.bias[:8].detach())
    ema = EMA(.5)
    learn = taught(ema)
    with pytest.raises(ValueError, match="'layer3.0.weight' of the student is not what it was"):
        learn.fit(1, cbs=At('after_step', prune, order=0, skip=0))

def test_a_loss_may_not_learn_it():
    "As it may not learn any teacher"
    ema = EMA(.5)
    model = net()
    taught(ema, model=model).fit(1)
    class Behind(DistillLoss):
        def __init__(self, part): self.part = part
        def forward(self, pred, teacher_pred): return (pred-teacher_pred).pow(2).mean()
    learn = taught(ema, TaskLoss()+Behind(ema.model), model)
    refuses(learn, 'is the teacher, which is held still')

# ---- files ----

class Stop(Exception): ...

def run(path, teacher, s, cbs=(), at=None, loss=None):
    "A fit of three epochs; nothing is shared with another call"
    learn = taught(teacher(), TaskLoss()+SoftTarget(T=1)+FitNet().at('layer3') if loss is None else loss, path=path)
    seed(s)
    for dl in learn.dls.loaders: dl.rng.seed(s)
    def stop(l):
        if l.training and (l.epoch,l.iter)==at: raise Stop
    if at is None: learn.fit_one_cycle(3, .05, cbs=list(cbs))
    else:
        with pytest.raises(Stop): learn.fit_one_cycle(3, .05, cbs=[*cbs,At('before_batch', stop)])
    return learn

def averages(learn):
    t = learn.knowledge_distillation.teacher
    one = t.teachers[0] if isinstance(t, Ensemble) else t
    return state(one.model)|{f'student.{k}': v for k,v in state(learn.model).items()}

@pytest.mark.parametrize('teacher,loss', [
    (lambda: EMA(.8),None), (lambda: EMA(.8, slow_start, 'average'),None),
    (lambda: Ensemble([EMA(.8),net(6, s=1)]),TaskLoss()+SoftTarget())])
def test_resumed_equals_the_uninterrupted(tmp_path, teacher, loss):
    def fresh(): return copy.deepcopy(loss)
    whole = averages(run(tmp_path, teacher, 0, loss=fresh()))
    run(tmp_path, teacher, 0, [Checkpoint('run')], at=(2,1), loss=fresh())
    again = averages(run(tmp_path, teacher, 7, [Checkpoint('run', resume=True)], loss=fresh()))
    assert_same(again, whole)

@pytest.mark.parametrize('lost', ['steps','model'])
def test_all_of_it_is_needed(tmp_path, lost):
    "The comparison can fail: the place in the warm-up and the average each make a difference"
    def ema(): return EMA(.99)
    whole = averages(run(tmp_path, ema, 0))
    run(tmp_path, ema, 0, [Checkpoint('run')], at=(2,1))
    f = tmp_path/'models'/'run.pth'
    kept = torch.load(f, weights_only=True)
    teacher = kept['kds'][0]['teacher']
    if lost=='steps': teacher['steps'] = 0
    else: teacher['model']['fc.bias'] += 1e-3
    torch.save(kept, f)
    other = averages(run(tmp_path, ema, 7, [Checkpoint('run', resume=True)]))
    assert not all(torch.equal(other[k], whole[k]) for k in whole)

def test_files_of_other_teachers_are_refused(tmp_path):
    loss = TaskLoss()+SoftTarget()
    run(tmp_path, lambda: EMA(.8), 0, [Checkpoint('ema')], at=(1,0), loss=loss)
    run(tmp_path, lambda: net(6, s=1), 0, [Checkpoint('frozen')], at=(1,0), loss=loss)
    for teacher,file,why in ((net(6, s=1),'ema','that changes in training, and Frozen'),
                             (EMA(.8),'frozen','of a fit with another teacher, here it is EMA'),
                             (Ensemble([EMA(),EMA()]),'ema','of a fit with another teacher')):
        learn = taught(teacher, loss, path=tmp_path)
        with pytest.raises(ValueError, match=why): learn.fit_one_cycle(3, .05, cbs=Checkpoint(file, resume=True))

class Own(Teacher):
    "A user's, which changes: it knows how many steps there were"
    def __init__(self): self.steps = torch.zeros(())
    def after_step(self, learn): self.steps += 1
    def state_dict(self): return dict(steps=self.steps)
    def load_state_dict(self, state): self.steps.copy_(state['steps'])
    def forward(self, xb): return torch.zeros(len(xb[0]), 10)+self.steps

def test_a_teacher_of_ones_own(tmp_path):
    "`state_dict` and `load_state_dict` are all it needs"
    own = Own()
    learn = taught(own, TaskLoss()+SoftTarget(), path=tmp_path)
    learn.lr_find(num_it=4, show_plot=False)
    assert own.steps==0
    learn.fit(1)
    twin = copy.deepcopy(learn)
    twin.fit(1)
    assert (own.steps,twin.knowledge_distillation.teacher.steps)==(3,6)
    run(tmp_path, Own, 0, [Checkpoint('own')], at=(2,0), loss=TaskLoss()+SoftTarget())
    again = run(tmp_path, Own, 1, [Checkpoint('own', resume=True)], loss=TaskLoss()+SoftTarget())
    assert again.knowledge_distillation.teacher.steps==9
