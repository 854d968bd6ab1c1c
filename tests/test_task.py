"What losses ask of a task: stand-ins, labels of all kinds, rows"
import pickle
from copy import copy,deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import KD,X,learner,seed,state,tuples
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,FocalLoss,MSELossFlat
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.task import (Rows,StandIn,check_labels,class_axis,found_axis,ignored_label,item_classes,
                                label_shares,same_class,task_kind)
from fasterdistill.teachers.teacher import Ensemble,Frozen

# ---- stand-ins ----

def half(pred, *yb): return F.cross_entropy(pred, *yb)/2

@pytest.mark.parametrize('copied', [lambda o: o, copy, deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
                         ids=['itself','copy','deepcopy','pickle'])
def test_stand_in(copied):
    "It calls the one and has the attributes of the other, as do its copies"
    f = copied(StandIn(half, CrossEntropyLossFlat(axis=1, ignore_index=255)))
    z,y = torch.zeros(1,2,3),torch.tensor([[0,1,0]])
    assert type(f) is StandIn and f(z, y)==F.cross_entropy(z, y)/2
    assert f.axis==1 and isinstance(f.func, nn.CrossEntropyLoss) and f.decodes is not None
    assert task_kind(f)=='single' and class_axis(z, criterion=f)==1 and ignored_label(f)==255
    with pytest.raises(AttributeError): f.nothing_of_the_kind

def test_stand_in_hands_no_special_method_on():
    class Odd(nn.Module):
        def __len__(self): return 3
        def __deepcopy__(self, memo): return 'a copy'
        def __getstate__(self): raise AssertionError('asked the base')
    f = StandIn(half, Odd())
    assert not hasattr(f, '__len__') and not hasattr(f, '__name__') and bool(f)
    assert type(twin := deepcopy(f)) is StandIn and twin.base=='a copy'
    bare = StandIn.__new__(StandIn)                               # as it is while it is being copied
    with pytest.raises(AttributeError): bare.axis

@pytest.mark.parametrize('base,kind,axis,ignored', [
    (nn.CrossEntropyLoss(ignore_index=9), 'single', 1, 9), (CrossEntropyLossFlat(axis=-1), 'single', 2, -100),
    (nn.BCEWithLogitsLoss(), 'multi', 2, None), (BCEWithLogitsLossFlat(), 'multi', 2, None),
    (nn.MSELoss(), 'regression', 2, None),
    (MSELossFlat(), 'regression', 2, None), (partial(F.cross_entropy, label_smoothing=.1), 'single', 1, None)],
    ids=lambda o: 'partial' if isinstance(o, partial) else str(o))
def test_what_stands_behind_is_found(base, kind, axis, ignored):
    "Behind one stand-in, and behind two"
    z = torch.zeros(2,5,7)
    if kind!='single' and hasattr(base, 'axis'): axis = base.axis%3
    for f in (base,StandIn(half, base),StandIn(half, StandIn(half, base))):
        assert (task_kind(f),class_axis(z, criterion=f),ignored_label(f))==(kind,axis,ignored)

# ---- where the classes are ----

def own(pred, y): return F.cross_entropy(pred, y)
def own_last(pred, y): return F.cross_entropy(pred.movedim(-1, 1), y)

@pytest.mark.parametrize('shape', [(2,5,7),(2,5,4,4),(2,5,3,4,6)], ids=str)
def test_labels_say_where_the_classes_are(shape):
    "First or last, of sequences, maps and volumes; without them it is a guess"
    for f,axis in ((own,1),(own_last,len(shape)-1)):
        z = torch.randn(shape).movedim(1, axis)
        y = torch.zeros(shape[:1]+shape[2:]).long()
        assert found_axis(z, y, f)==class_axis(z, y, f)==axis
        assert found_axis(z, y.float(), f) is None and found_axis(z, None, f) is None
        assert found_axis(z, y, nn.CrossEntropyLoss()) is found_axis(z, y, nn.MSELoss()) is None

@pytest.mark.parametrize('shape', [(3,6,6),(3,5,5,5)], ids=str)
def test_as_many_classes_as_positions(shape):
    "The loss function knows, whichever way its classes are"
    z,y = torch.randn(shape),torch.randint(0, 5, shape[:-1])
    for f,axis in ((own,1),(own_last,len(shape)-1),(FocalLoss(),1)):
        assert found_axis(z, y, f, lambda z, f=f: f(z, y))==axis

lengths = {11: 'other', 5: 'as many'}        # positions, of five classes

def sequences(L):
    "Digits as eight channels of eight positions, or a few more, or fewer, each position with a class"
    x = torch.cat([X[:160,0],X[:160,0]], 2)[...,:L]
    return tuples(x, (x.mean(1)*10).long().clamp(0, 4))

def conv(classes, s):
    seed(s)
    return nn.Sequential(nn.Conv1d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, classes, 1))

def taught(teacher, loss_func, L):
    "The history of a fit, what it learned"
    learn,cb = learner(conv(5, 0), sequences(L), loss_func=loss_func, metrics=[]),KD(teacher(), TaskLoss()+SoftTarget())
    learn.fit(1, cbs=cb)
    return cb.history[0],state(learn.model)

def of_other_classes(): return Frozen(conv(7, 3), classes=[6,5,4,3,2])

teachers = dict(one=lambda: conv(5, 1), several=lambda: Ensemble([conv(5, 1),conv(5, 2)], 'single'),
                other_classes=of_other_classes,
                several_of_other_classes=lambda: Ensemble([of_other_classes(),conv(5, 1)], 'single'))

@pytest.mark.parametrize('L', lengths, ids=lengths.get)
@pytest.mark.parametrize('name', teachers)
def test_one_axis_for_all(name, L):
    """`(B,C,L)` predictions under a function that states no axis: ensemble, other classes, the loss and the agreement
    are what they are under torch's own, which does"""
    (a,weights),(b,others) = (taught(teachers[name], f, L) for f in (own,nn.CrossEntropyLoss()))
    assert a==pytest.approx(b)
    for k in others: assert torch.equal(weights[k], others[k])

# ---- labels ----

nan,ce255 = float('nan'),nn.CrossEntropyLoss(ignore_index=255)
eye = torch.eye(4)

@pytest.mark.parametrize('y,criterion,want', [
    (torch.tensor([0,3,2]), None, [0,3,2]), (torch.tensor([[0],[3],[2]], dtype=torch.int8), None, [0,3,2]),
    (torch.tensor([0,-100,2]), None, [0,-1,2]), (torch.tensor([0,-1,2]), ce255, [0,-1,2]),
    (torch.tensor([0,255,2], dtype=torch.uint8), ce255, [0,-1,2]),
    (torch.tensor([0,-100,255]), ce255, [0,-1,-1]),
    (eye[[0,3,2]], None, [0,3,2]),
    (torch.stack([eye[0],eye[0]*nan,.6*eye[2]+.4*eye[1]]).half(), None, [0,-1,2])], ids=str)
def test_labels_of_all_kinds(y, criterion, want):
    "As classes, as shares, and as what has a class in common"
    classes = item_classes(y, criterion)
    assert classes.tolist()==want and classes.dtype==torch.long
    check_labels('a loss', y, criterion)
    shares = label_shares(y, torch.zeros(3,4), criterion)
    for row,c in zip(shares, want, strict=True):
        assert row.dtype==torch.float32
        if c<0: assert not row.any()
        else: assert row.argmax()==c and abs(row.sum()-1)<1e-3
    alike = [[a==b and a>=0 for b in want] for a in want]
    assert same_class(y, criterion=criterion).tolist()==alike

def test_no_class_of_the_logits():
    "A number that is no class's has no share"
    assert label_shares(torch.tensor([0,4,99]), torch.zeros(3,4)).sum(1).tolist()==[1,0,0]

def test_156_is_a_class():
    "-100 is 156 in eight bits, which is a class where labels are eight bits"
    y = torch.tensor([156,3], dtype=torch.uint8)
    assert item_classes(y).tolist()==[156,3] and label_shares(y, torch.zeros(2,200))[0,156]==1
    z = torch.zeros(1,200,1,2)
    assert Rows('', z, z, y[None,None]).counts.all()

# ---- rows ----

def test_labels_that_are_not_one_a_row():
    "A label for a whole picture says nothing of its pixels: all count, and shares are refused"
    z = torch.randn(2,3,4,4)
    rows = Rows('a loss', z, z, torch.tensor([0,1]))
    assert rows.counts is None and rows.pred.shape==(32,3)
    with pytest.raises(ValueError, match=r'a loss: labels of shape \(2,\) for 32 pixels'): rows.shares
    with pytest.raises(ValueError, match=r'a loss: labels of shape \(2,\) for 32 pixels'):
        Rows('a loss', z, z, torch.tensor([0,1]), criterion=nn.CrossEntropyLoss())      # which wants a label a pixel
    assert Rows('a loss', z, z).counts is None

def test_rows_are_of_plain_tensors():
    from fastai.torch_core import TensorCategory,TensorMask
    z = torch.randn(2,3,4,4)
    rows = Rows('', TensorMask(z), z, TensorCategory(torch.zeros(2,4,4).long()))
    assert {type(o) for o in (rows.pred,rows.teacher_pred,rows.counts,rows.shares)}=={torch.Tensor}

@pytest.mark.parametrize('axis,shape', [(1,(2,3,4,5)),(1,(2,3,4)),(2,(2,4,3))])
def test_rows_and_labels_go_together(axis, shape):
    z = torch.randn(shape)
    y = torch.randint(0, 3, shape[:axis]+shape[axis+1:])
    y.view(-1)[::3] = -100
    rows = Rows('', z, 2*z, y, criterion=CrossEntropyLossFlat(axis=axis))
    flat = z.movedim(axis, -1).reshape(-1, 3)
    assert torch.equal(rows.pred, flat) and torch.equal(rows.teacher_pred, 2*flat)
    assert torch.equal(rows.counts, y.flatten()>=0) and torch.equal(rows.shares.sum(1)>0, rows.counts)
    want = F.cross_entropy(flat, y.flatten())
    torch.testing.assert_close(rows.mean(-(rows.shares*flat.log_softmax(1)).sum(1)), want)

def test_nothing_counts():
    z = torch.randn(2,3,4, requires_grad=True)
    rows = Rows('', z, z.detach(), torch.full((2,4), -100), criterion=nn.CrossEntropyLoss())
    mean = rows.mean(rows.pred.sum(1))
    mean.backward()
    assert mean==0 and not z.grad.any()
