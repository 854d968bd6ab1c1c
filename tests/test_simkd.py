"""SimKD: the numbers of the authors' code, and that what it trains is a network like any other: in metrics, files and
exports, without this package."""
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import KD,X,assert_same,get_dls,learner,left,net,refuses,state
from fastai.learner import load_learner
from torch import nn

from fasterdistill.losses.simkd import SimKD,body,simkd_student

dtypes = pytest.mark.parametrize('dtype', [torch.float64,torch.float32], ids=['64','32'])

def ends(width, stride, x=None):
    "A network that ends in a map, its mean and a linear layer"
    return nn.Sequential(nn.Conv2d(1, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, 10))

def given():
    with np.load(Path(__file__).parent/'vectors'/'simkd.npz') as d: return dict(d)

@dtypes
def test_vectors(dtype):
    v = given()
    m = simkd_student(ends(6, 1), ends(8, 2), torch.rand(2, 1, 8, 8)).to(dtype).train()
    par = dict(zip(('conv1x1_in','conv3x3','conv1x1_out'), m.projector[::3], strict=True))
    with torch.no_grad():
        for name,conv in par.items(): conv.weight.copy_(torch.tensor(v[f'par_{name}']))
        m.classifier.weight.copy_(torch.tensor(v['par_teacher_fc_weight']))
        m.classifier.bias.copy_(torch.tensor(v['par_teacher_fc_bias']))
    s = torch.tensor(v['in_fs'], dtype=dtype).requires_grad_()
    projected = m.projector(m.pool(s))
    loss = SimKD()(fm_s={'a':projected}, fm_t={'a':torch.tensor(v['in_ft'], dtype=dtype)})
    tol = 1e-9 if dtype is torch.float64 else 2e-5
    np.testing.assert_allclose(loss.item(), v['out_mse_mean'], rtol=tol)
    said = m[1:](s).detach().double().numpy()
    want = v['out_logits_through_teacher_fc']
    np.testing.assert_allclose(said, want, rtol=0, atol=tol*np.abs(want).max())
    g, = torch.autograd.grad(loss, s)
    tol = 1e-6 if dtype is torch.float64 else 1e-3                   # as README.md of the vectors gives this file
    np.testing.assert_allclose(g.double().numpy(), v['grad_fs'], rtol=0, atol=tol*np.abs(v['grad_fs']).max())

def test_by_hand():
    "The loss by loops, on maps of unequal sizes"
    s,t = torch.randn(3, 5, 4, 6, dtype=torch.float64),torch.randn(3, 5, 2, 3, dtype=torch.float64)
    total = 0.
    for b in range(3):
        for c in range(5):
            for i in range(2):
                for j in range(3): total += (s[b,c,2*i:2*i+2,2*j:2*j+2].mean()-t[b,c,i,j])**2/90
    torch.testing.assert_close(SimKD()(fm_s={'a':s}, fm_t={'a':t}), total, rtol=1e-12, atol=0)

def test_student_is_plain(teacher, tmp_path):
    "Its metrics, files and exports are those of the network; nothing in a file names this package"
    student = net()
    was,teachers = state(student),state(teacher)
    m = simkd_student(student, teacher, X[:2])
    head = deepcopy(m.classifier)
    assert 'fasterdistill' not in str({type(o).__module__ for o in m.modules()})
    cb = KD(teacher, SimKD(), weight=1.)
    learn = learner(m, get_dls(), cbs=cb)
    start = state(m)
    learn.fit(2)
    assert left(learn, teacher)==['optimizer']                       # which has all but the frozen classifier:
    trained = {id(p) for p in m.parameters() if p.requires_grad}
    assert {id(p) for p,*_ in learn.opt.all_params()}==trained=={id(p) for p in m[:-1].parameters()}
    assert_same(state(student), was)                                 # a copy was trained
    assert_same(state(teacher), teachers)
    assert_same(state(learn.model.classifier), state(head))
    assert not torch.equal(learn.model.projector[0].weight, start['projector.0.weight'])
    assert not torch.equal(learn.model.body.layer1[0].weight, start['body.layer1.0.weight'])

    learn.save('simkd')
    other = learner(simkd_student(net(s=9), teacher, X[:2]), get_dls())
    other.load('simkd')
    assert_same(state(other.model), state(learn.model))
    learn.remove_cb(cb)
    learn.export(tmp_path/'m.pkl')
    assert b'fasterdistill' not in (tmp_path/'m.pkl').read_bytes()
    got = load_learner(tmp_path/'m.pkl').model.eval()
    with torch.no_grad(): assert torch.equal(got(X[:9]), deepcopy(learn.model).eval()(X[:9]))
    exported = torch.export.export(deepcopy(learn.model).eval(), (X[:4],)).module()
    torch.testing.assert_close(exported(X[:4]), got(X[:4]))

def test_only_what_is_needed():
    "The body has no later parameters, and keeps its mode"
    cut = body(net(), 'layer2')
    assert [n for n,_ in cut.named_children()]==['layer1','layer2']
    assert b'fasterdistill' not in pickle.dumps(cut)
    assert not any(o.training for o in body(net().eval(), 'layer2').modules())
    m = simkd_student(net().eval(), net(8), X[:2])
    assert not any(o.training for o in m.modules())

class Through(nn.Module):
    "Runs its one layer twice"
    def __init__(self):
        super().__init__()
        self.conv,self.fc = nn.Conv2d(1, 1, 3, 1, 1),nn.Linear(1, 10)
    def forward(self, x): return self.fc(F.relu(self.conv(self.conv(x))).mean((2,3)))

class Dropping(Through):
    "Drops at random while it trains, without a module of its own"
    def forward(self, x): return self.fc(self.conv(F.dropout(x, training=self.training)).mean((2,3)))

@pytest.mark.parametrize('model,why', [(Through(),'called 2 times'), (Dropping(),'in training it does something else')])
def test_refused(model, why):
    with pytest.raises(ValueError, match=why): body(model, 'conv')

def test_a_student_without_projector_is_refused(teacher):
    refuses(learner(net(), get_dls(), cbs=KD(teacher, SimKD(), weight=1.)), 'make the student with simkd_student')
