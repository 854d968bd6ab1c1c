"""The lines of fasterai's two tutorials with the import changed, and its schedules. Where fasterai is installed its own
functions and its callback are the other opinion."""
import copy
import math

import pytest
import torch
from common import At,X,assert_close,assert_same,get_dls,in_float64,learner,left,net,real,seed,state
from torch import nn

import fasterdistill.all as ours
from fasterdistill.all import KnowledgeDistillationCallback,TaskLoss,get_model_layers,match_feature_layers

def installed():
    "fasterai's losses and callback, and its schedules"
    theirs = pytest.importorskip('fasterai.distill.all', reason='needs fasterai: pip install fasterai')
    return theirs,pytest.importorskip('fasterai.core.schedule')

class Cos:
    "A schedule as fasterai's `cos`"
    def progress(self, pct_train): return (1-math.cos(math.pi*pct_train))/2

# ---- the tutorials' lines ----

on_outputs = 'SoftTarget','DecoupledKD','Logits','Mutual'
on_layers = 'Attention','Similarity','FitNet','ActivationBoundaries'

def pairs_of(student, teacher): return match_feature_layers(student, teacher, real(X[:1]))

@pytest.mark.parametrize('name', on_outputs)
def test_output_losses(teacher, name):
    learn = learner()
    kd = KnowledgeDistillationCallback(teacher, getattr(ours, name), weight=0.5)
    learn.fit_one_cycle(1, 1e-3, cbs=kd)
    assert all(math.isfinite(v) for v in kd.parts.values())
    assert left(learn, teacher)==[]

@pytest.mark.parametrize('name', on_layers)
def test_intermediate_losses(teacher, name):
    learn = learner()
    pairs = pairs_of(learn.model, teacher)
    kd = KnowledgeDistillationCallback(
        teacher, getattr(ours, name),
        pairs['student'], pairs['teacher'],
        weight=0.9
    )
    learn.fit_one_cycle(1, 1e-3, cbs=kd)
    assert all(math.isfinite(v) for v in kd.parts.values())
    assert left(learn, teacher)==[]

# ---- layers ----

def test_layers_are_found_and_nothing_moves(teacher):
    student = net()
    student.train()
    student.layer2.eval()
    was,modes = [state(m) for m in (student,teacher)],[o.training for o in student.modules()]
    rng = torch.get_rng_state()
    assert pairs_of(student, teacher)==dict(student=['layer1','layer2','layer3'], teacher=['layer1','layer2','layer3'])
    for m,w in zip((student,teacher), was, strict=True): assert_same(state(m), w)
    assert [o.training for o in student.modules()]==modes
    assert torch.equal(torch.get_rng_state(), rng)

def test_names_of_layers():
    shared = nn.ReLU()
    m = nn.Sequential(nn.Linear(2,2), shared, nn.Sequential(shared, nn.Identity()))
    m.nothing = None
    assert get_model_layers(m)==['0','1','2','2.0','2.1']
    assert list(get_model_layers(m, get_layer_repr=True).items())[1]==('1','ReLU()')
    theirs,_ = installed()
    for o in (m,net()):
        assert get_model_layers(o)==theirs.get_model_layers(o)
        assert get_model_layers(o, True)==dict(theirs.get_model_layers(o, True))

# ---- schedules ----

@in_float64
def test_a_schedule_weighs(teacher):
    "What is trained on, step by step: task and distillation mixed by `weight` times the schedule's progress"
    kd,steps = KnowledgeDistillationCallback(teacher, ours.SoftTarget, weight=.8, schedule=Cos()),[]
    learn = learner(cbs=kd)
    def note(l): steps.append((l.pct_train,float(l.loss),kd.parts,float(l.loss_grad)))
    learn.fit(2, cbs=[At('before_backward', note)])
    assert len(steps)==6
    for pct,task,parts,total in steps:
        share = .8*(1-math.cos(math.pi*pct))/2
        assert abs(total-(1-share)*task-share*parts.get('soft_target', 0))<1e-9
    assert steps[0][0]==0
    assert 'soft_target' not in steps[0][2]                          # a weight of 0 is not computed

@in_float64
def test_a_schedule_in_a_sum(teacher):
    "As a function of `pos` that says the same"
    def rise(pos): return Cos().progress(pos)
    ends = []
    for w in (Cos(),rise):
        learn = learner(cbs=KnowledgeDistillationCallback(teacher, TaskLoss()+2*(w*ours.SoftTarget)))
        learn.fit(2)
        ends.append(state(learn.model))
    assert_same(*ends)

@in_float64
@pytest.mark.parametrize('name', ['cos','lin','one_cycle','agp','iterative'])
def test_their_schedules_and_their_callback(teacher, name):
    "Their function in their callback and in ours, with a schedule of theirs"
    theirs,schedules = installed()
    def run(callback):
        schedule = copy.deepcopy(getattr(schedules, name))
        learn = learner(dls=get_dls(shuffle=False))
        seed(3)
        learn.fit(3, cbs=callback(teacher, theirs.SoftTarget, weight=.7, schedule=schedule))
        teacher.train()
        return state(learn.model)
    mine,own = run(KnowledgeDistillationCallback),run(theirs.KnowledgeDistillationCallback)
    assert_close(mine, own)
    plain = learner(dls=get_dls(shuffle=False))
    plain.fit(3)
    assert not torch.equal(mine['fc.weight'], plain.model.fc.weight)

@in_float64
@pytest.mark.parametrize('name', [*on_outputs,*on_layers])
def test_their_losses_as_they_are(teacher, name):
    "Handed over to our callback: the numbers of theirs"
    theirs,_ = installed()
    wide = copy.deepcopy(teacher)                                    # FitNet and boundaries compare maps of one width
    layers = None if name in on_outputs else ['layer2','layer3']
    def run(callback):
        learn = learner(net(8), dls=get_dls(shuffle=False))
        learn.fit(2, cbs=callback(wide, getattr(theirs, name), layers, layers, weight=.3))
        wide.train()
        return state(learn.model)
    assert_close(run(KnowledgeDistillationCallback), run(theirs.KnowledgeDistillationCallback))
