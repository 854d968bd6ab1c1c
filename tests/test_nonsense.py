"What one batch shows to be nonsense: said by plan() and once by the fit, which goes on"
import warnings

import pytest
import torch
import torch.nn.functional as F
from common import KD,Out,X,Y,hf_vit,learner,loud,net,seed,state,tuples
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses import (DIST,DKD,FCFD,NKD,OFA,RLD,TAS,WSL,WTTM,AdjustedSoftTarget,BinarySoftTarget,FitNet,
                                  HardTarget,Logits,Mutual,OFALogits,SoftTarget)
from fasterdistill.teachers.teacher import Frozen,Teacher

def softmax(z): return z.softmax(1)
def mse(p, y): return (p-y).pow(2).mean()
def own(p, y): return F.cross_entropy(p, y)
teacher = loud(net(8, s=1))
several = torch.stack([Y%2==0, Y>4, (Y==2)|(Y==3)], 1).float()[:160]
numbers = torch.stack([Y*.3, Y-4., Y*Y], 1)[:160]

def told(learn, cb):
    "What plan() says, and what a fit warns of"
    plan = cb.plan(learn)
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        was = state(learn.model)
        learn.fit(1, cbs=cb)
    assert not all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())
    fits = [str(w.message) for w in got if w.category is UserWarning and 'fasterdistill' in w.filename]
    assert plan.advice==fits
    return plan.advice

def learn(y=Y[:160], loss=None, model=None):
    return learner(model or net(), tuples(X[:160], y), loss_func=loss, metrics=[])

@pytest.mark.parametrize('loss', [SoftTarget(), TaskLoss()+OFALogits()], ids=repr)
def test_a_teacher_that_ends_in_softmax(loss):
    said, = told(learn(), KD(Out(teacher, softmax), loss))
    name = repr(loss).split(' + ')[-1]
    assert said==f'the teacher returns probabilities, and {name} reads logits: Frozen(teacher, probabilities=True) ' \
                 'makes logits of them'
    assert told(learn(), KD(Frozen(Out(teacher, softmax), probabilities=True), loss))==[]
    assert told(learn(), KD(teacher, loss))==[]
    assert told(learn(), KD(Out(teacher, lambda z: z.log_softmax(1)), loss))==[]
    asked = teacher.eval()
    said, = told(learn(), KD(lambda x: softmax(asked(x)), loss))
    assert said.endswith('let it return their logarithm')
    teacher.train()

kinds = [SoftTarget,AdjustedSoftTarget,DIST,DKD,Mutual,NKD,OFALogits,RLD,WSL,WTTM,OFA,FCFD,TAS]

@pytest.mark.parametrize('loss', kinds, ids=lambda o: o.__name__)
def test_every_loss_that_reads_logits(loss):
    "What runs parts of the teacher again is given the layers within"
    at = {FCFD: ['layer1','layer2','layer3'], TAS: ['layer3','fc:in']}.get(loss)
    one = loss().at(at, [f'm.{n}' for n in at]) if at else loss()
    advice = KD(Out(teacher, softmax), TaskLoss()+one).plan(learn()).advice
    assert any(o.startswith(f'the teacher returns probabilities, and {one!r} reads logits') for o in advice)

def test_the_class_a_teacher_names():
    "Is the same, whether it says probabilities or logits"
    assert told(learn(), KD(Out(teacher, softmax), HardTarget()))==[]

# ---- before classes are picked, and of each member of an ensemble ----

few = [7,2,5]
def of_few(): return learn((Y[:160]%3), model=net(classes=3))

def test_classes_of_a_teacher_that_ends_in_softmax():
    "Three of its ten probabilities sum to anything"
    said, = told(of_few(), KD(Frozen(Out(teacher, softmax), classes=few), SoftTarget()))
    assert said.startswith('the teacher returns probabilities, and SoftTarget(')
    assert told(of_few(), KD(Frozen(Out(teacher, softmax), classes=few, probabilities=True), SoftTarget()))==[]
    assert told(of_few(), KD(Frozen(teacher, classes=few), SoftTarget()))==[]

def rightly(t): return Frozen(t, probabilities=True)
def says(f):
    asked = loud(net(8, s=1)).eval()
    return lambda x: f(asked(x))
class Own(Teacher):
    def forward(self, xb): return says(softmax)(*xb)

members = {
    'the second': (lambda: [net(6, s=2),Out(teacher, softmax)], [2], 'Frozen(teacher, probabilities=True) makes'),
    'both': (lambda: [Out(net(6, s=2), softmax),Out(teacher, softmax)], [1,2], 'Frozen(teacher, probabilities=True)'),
    'a function': (lambda: [says(softmax),teacher], [1], 'let it return their logarithm'),
    'arrays': (lambda: [says(lambda z: softmax(z).detach().numpy()),teacher], [1], 'let it return their logarithm'),
    "the user's own": (lambda: [teacher,Own()], [2], 'let it return their logarithm'),
    'inside another': (lambda: [teacher,[teacher,Out(teacher, softmax)]], [2], 'Frozen(teacher, probabilities=True)'),
    'said': (lambda: [rightly(Out(net(6, s=2), softmax)),teacher], [], ''),
    'logarithms': (lambda: [says(lambda z: z.log_softmax(1)),teacher], [], '')}

@pytest.mark.parametrize('loss', [SoftTarget(),Logits(),TaskLoss()+DKD()], ids=repr)
@pytest.mark.parametrize('which', members)
def test_members_of_an_ensemble(which, loss):
    "Which one: the ensemble reads logits, whatever reads its mean"
    make,odd,cure = members[which]
    said = told(learn(), KD(make(), loss))
    assert [o.partition(',')[0] for o in said]==[f'member {i} of the ensemble' for i in odd]
    assert all('returns probabilities, and the ensemble averages logits: '+cure in o for o in said)

def test_members_whose_classes_are_picked():
    def some(f): return [Frozen(net(6, s=2), classes=few),Frozen(Out(teacher, f), classes=few)]
    said, = told(of_few(), KD(some(softmax), SoftTarget()))
    assert said.startswith('member 2 of the ensemble, Frozen(Out), returns probabilities')
    assert told(of_few(), KD(some(lambda z: z), SoftTarget()))==[]

def test_members_that_end_in_sigmoid():
    t = loud(net(8, classes=3, s=1), 6)
    def multi(): return learn(several, BCEWithLogitsLossFlat(), net(classes=3))
    said, = told(multi(), KD([t,Out(t, torch.sigmoid)]))
    assert said.startswith('member 2 of the ensemble, Frozen(Out), returns probabilities')
    assert told(multi(), KD([t,rightly(Out(t, torch.sigmoid))]))==[]

def test_an_ensemble_of_numbers():
    "The mean of shares is a regression's as of any numbers"
    def shares(): return learn(F.one_hot(Y[:160], 10).float(), nn.MSELoss())
    assert told(shares(), KD([teacher,Out(teacher, softmax)], Logits()))==[]

@pytest.mark.parametrize('loss', [SoftTarget(),Logits()], ids=repr)
@pytest.mark.parametrize('teachers', [lambda t: t, lambda t: [teacher,t]], ids=['alone','a member'])
def test_no_probabilities_where_they_are_said(teachers, loss):
    "The logarithm of what is below 0 is that of the smallest number"
    said, = told(learn(), KD(teachers(rightly(teacher)), loss))
    z = teacher.eval()(X[:32])
    assert f'returns numbers from {z.min():.4g} to {z.max():.4g}, which are no probabilities' in said
    teacher.train()

def test_nothing_is_kept_of_what_teachers_said():
    cb = KD([teacher,says(softmax)], SoftTarget())
    with pytest.warns(UserWarning, match='member 2'): learn().fit(1, cbs=cb)
    assert [t.heard for t in cb.teacher.teachers]==[None,None]

def test_a_student_that_ends_in_softmax():
    said, = told(learn(model=Out(net(), softmax)), KD(teacher, SoftTarget()))
    assert said.startswith('the student returns probabilities') and 'leave that to the loss function' in said

def test_probabilities_over_pixels():
    seg = nn.Conv2d(1, 3, 3, 1, 1)
    y = (X[:160,0]>.3).long()
    said, = told(learn(y, nn.CrossEntropyLoss(), nn.Conv2d(1, 3, 3, 1, 1)), KD(Out(seg, softmax), SoftTarget()))
    assert 'the teacher returns probabilities' in said

def test_a_teacher_that_ends_in_sigmoid():
    t = loud(net(8, classes=3, s=1), 6)
    def multi(): return learn(several, BCEWithLogitsLossFlat(), net(classes=3))
    assert told(multi(), KD(t))==[]
    said, = told(multi(), KD(Out(t, torch.sigmoid)))
    assert 'the teacher returns probabilities, and BinarySoftTarget() reads logits' in said
    assert told(multi(), KD(Frozen(Out(t, torch.sigmoid), probabilities=True)))==[]

def test_losses_that_are_not_for_logits():
    "What compares raw values, layers, or is the user's own function may be given anything"
    def f(pred, teacher_pred): return mse(pred, teacher_pred)
    for loss in (Logits(), f, TaskLoss()+FitNet().at('layer3','m.layer3')):
        assert told(learn(), KD(Out(teacher, softmax), loss))==[]

@pytest.mark.parametrize('y,classes,loss,said', [
    (numbers, 3, SoftTarget(), 'one class of several, and the labels (32, 3) are numbers from -4 to 81'),
    (numbers[:,:1]+.5, 1, BinarySoftTarget(), 'yes or no each, and the labels (32, 1) are numbers from 0.5 to 3.2'),
    (several, 3, SoftTarget(), 'one class of several, and the labels (32, 3) are numbers from 0 to 1'),
    (numbers, 3, Logits(), None), (several, 3, BinarySoftTarget(), None),
    (F.one_hot(Y[:160], 10)*.8+.02, 10, SoftTarget(), None), (Y[:160], 10, SoftTarget(), None)],
    ids=['numbers','one number','several classes','right','right','shares','classes'])
def test_an_own_loss_function(y, classes, loss, said):
    "Which does not say what outputs are; the labels do"
    def f(p, y): return own(p, y) if y.shape!=p.shape else mse(p, y)
    got = told(learn(y, f, net(classes=classes)), KD(net(8, classes, s=1), loss))
    if said is None: assert got==[]
    else: assert said in got[0] and 'for a regression there is Logits()' in got[0]

def test_a_regression_by_an_own_loss_function():
    "The first error leads to Logits, and to the word that says the kind"
    y = numbers[:,:1]
    def my_loss(p, y): return mse(p, y)
    def make(): return learn(y, my_loss, net(classes=1))
    t = net(8, 1, s=1)
    with pytest.raises(ValueError) as e: make().fit(1, cbs=KD(t))
    assert 'Logits() for a regression' in str(e.value)
    assert "loss_func.kind = 'single', 'multi' or 'regression'" in str(e.value)
    my_loss.kind = 'regression'
    cb = KD(t)
    make().fit(1, cbs=cb)
    assert type(cb.loss) is Logits
    cb = KD([t,net(8, 1, s=2)])                                             # an ensemble asks the same word
    make().fit(1, cbs=cb)
    assert 'mean of the values' in repr(cb)

# ---- words ----

def texts(n, m=60):
    "Sentences of numbers below `m`, of a vocabulary of `n`"
    seed(5)
    dls = tuples(torch.randint(0, m, (160, 12)), Y[:160]%2)
    dls.vocab = ([f'w{i}' for i in range(n)],['no','yes'])
    return dls

class Bag(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.words,self.places,self.fc = nn.Embedding(n, 8),nn.Embedding(12, 8),nn.Linear(8, 2)
    def forward(self, x): return self.fc((self.words(x)+self.places.weight).mean(1))

def test_words_of_another_vocabulary():
    def make(): return learner(Bag(600), texts(600), metrics=[])
    assert told(make(), KD(Bag(600), SoftTarget()))==[]
    said, = told(make(), KD(Bag(30522), SoftTarget()))
    assert said.startswith('Frozen(Bag) knows 30,522 words and the data has numbers for 600')
    assert told(make(), KD(Frozen(Bag(30522), inputs=lambda x: x+7), SoftTarget()))==[]
    said, = told(make(), KD([Bag(600),Bag(30522)], SoftTarget()))
    assert '30,522' in said
    bare = tuples(torch.randint(0, 60, (160, 12)), Y[:160]%2)               # nothing is known of its numbers
    assert told(learner(Bag(600), bare, metrics=[]), KD(Bag(30522), SoftTarget()))==[]

def test_a_bare_bert():
    from transformers import BertConfig,BertForSequenceClassification
    seed()
    bert = BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                                    intermediate_size=8, num_labels=2))
    said, = told(learner(Bag(600), texts(600), metrics=[]), KD(bert, SoftTarget()))
    assert said.startswith('Frozen(BertForSequenceClassification) knows 30,522 words')

def test_pictures_know_no_words():
    "Two targets of classes have two vocabs, neither of which is of words"
    dls = tuples(X[:160], Y[:160])
    dls.vocab = ([str(i) for i in range(10)],['no','yes'])
    student = learner(hf_vit(), dls, loss_func=lambda p,y: own(p.logits, y), metrics=[])
    assert told(student, KD(hf_vit(s=1), SoftTarget()))==[]

class OnShares(DistillLoss):
    def forward(self, pred, teacher_pred): return mse(pred.softmax(1), teacher_pred)

def test_a_warning_is_no_error():
    "Whoever knows better goes on"
    said, = told(learn(), KD(Out(teacher, softmax), OnShares()))
    assert 'OnShares() reads logits' in said
