"""What a teacher is given and what it gives back: every kind of teacher in a real fit, numbers against plain PyTorch, and what is refused."""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import KD,At,Watch,X,Y,assert_same,get_dls,learner,left,net,seed,state
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,MSELossFlat
from fastai.optimizer import SGD
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import BinarySoftTarget,SoftTarget
from fasterdistill.teachers.teacher import Called,Ensemble,Frozen,Teacher,as_teacher

torch.set_num_threads(1)

class Heard(DistillLoss):
    "Keeps what the teacher says, and to what"
    def __init__(self): self.said = []
    def forward(self, pred, teacher_pred, xb): self.said.append((xb,teacher_pred)); return (pred.mean()-teacher_pred.mean())**2

def heard(teacher, learn=None, n=1, **kwargs):
    "The inputs and the teacher's predictions of each training batch of a fit"
    loss = Heard()
    learn = learn or learner(metrics=[])
    seed(3); learn.fit(n, cbs=KD(teacher, TaskLoss()+loss, **kwargs))
    said = loss.said[1:]                                   # the first is the trial
    assert len(said)==3*n and not any(t.requires_grad for _,t in said) and all(t.dtype==torch.float32 for _,t in said)
    return said

def asked(model, x):
    m = copy.deepcopy(model).eval()
    with torch.no_grad(): return m(x)

@pytest.fixture
def teacher(): return net(8, s=1)

# ---- what may teach ----

def test_a_module(teacher):
    grads = []
    teacher.fc.register_forward_hook(lambda m,a,o: grads.append((torch.is_grad_enabled(),m.training,o.requires_grad)))
    teacher.layer2.requires_grad_(False); teacher.layer1.eval()
    was,flags,modes = state(teacher),[p.requires_grad for p in teacher.parameters()],[m.training for m in teacher.modules()]
    for (x,),t in heard(teacher): assert type(x) is torch.Tensor and torch.equal(t, asked(teacher, x))
    assert set(grads[:-3])=={(False,False,False)}
    assert_same(was, state(teacher)); assert flags==[p.requires_grad for p in teacher.parameters()] and modes==[m.training for m in teacher.modules()]

def test_a_learner(teacher):
    learn = learner(teacher, get_dls()); cbs = list(learn.cbs)
    for (x,),t in heard(learn): assert torch.equal(t, asked(teacher, x))
    assert list(learn.cbs)==cbs and learn.model is teacher and left(learn)==[]
    learn.fit(1)                                            # it can be trained again

def test_an_exported_learner(teacher, tmp_path):
    learn = learner(teacher, get_dls(), path=tmp_path); learn.export('t.pkl')
    for path in (tmp_path/'t.pkl', str(tmp_path/'t.pkl')):
        for (x,),t in heard(path): assert torch.equal(t, asked(teacher, x))
    with pytest.raises(FileNotFoundError): KD(tmp_path/'none.pkl')

def test_a_function(teacher):
    teacher.eval()
    for (x,),t in heard(lambda x: 2*teacher(x).detach()): assert torch.equal(t, 2*asked(teacher, x))
    for (x,),t in heard(lambda x: teacher(x)): assert torch.equal(t, asked(teacher, x))       # no graph, whatever the function does
    with pytest.raises(ValueError, match='reads the layers of one network'): KD(lambda x: teacher(x), TaskLoss()+FitNet())

def test_none():
    class Flat(DistillLoss):
        def forward(self, pred): return pred.pow(2).mean()
    learn = learner(); learn.fit(1, cbs=KD(None, TaskLoss()+Flat())); assert left(learn)==[]

def test_own_teacher():
    "A Teacher reads by name, is set up, reset, told of steps and closed"
    calls = []
    class Own(Teacher):
        def setup(self, learn): calls.append('setup')
        def close(self): calls.append('close')
        def reset(self): calls.append('reset')
        def after_step(self, learn): calls.append('step')
        def forward(self, xb, idx, pred): return F.one_hot(Y[idx], 10).float()+0*pred
    learn,loss,got = learner(),Heard(),[]
    learn.fit(2, cbs=[KD(Own(), TaskLoss()+loss),At('after_pred', lambda l: l.training and got.append(F.one_hot(l.y, 10).float()))])
    assert all(torch.equal(t, y) for (_,t),y in zip(loss.said[1:], got, strict=True))       # idx are the positions in the training set, shuffled or not
    assert calls[:2]==['reset','setup'] and calls.count('step')==6 and calls.count('reset')==2 and calls[-1]=='close' and left(learn)==[]

def test_what_cannot_teach(teacher):
    with pytest.raises(TypeError, match='3 cannot teach'): as_teacher(3)
    with pytest.raises(TypeError, match='the class Linear: expected a trained network'): as_teacher(nn.Linear)
    with pytest.raises(TypeError, match='expected a module'): Frozen(3)
    with pytest.raises(ValueError, match='at least one'): as_teacher([])
    with pytest.raises(ValueError, match="kind='some'"): Ensemble([teacher], kind='some')
    with pytest.raises(ValueError, match='belong together'): Frozen(teacher, mean=[.5])
    with pytest.raises(TypeError, match='cannot teach'): as_teacher([teacher,3])

misplaced = {'one': SoftTarget(), 'with layers': FitNet().at('fc'), 'a sum': .1*TaskLoss()+SoftTarget(),
             'a class': SoftTarget, 'a partial': partial(SoftTarget, T=2)}
takes = dict(by_itself=as_teacher, frozen=Frozen, callback=KD, swapped=lambda o: KD(o, net()),
             twice=lambda o: KD(o, SoftTarget()), listed=lambda o: as_teacher([net(),o]),
             ensemble=lambda o: Ensemble([o,net()]))

@pytest.mark.parametrize('wrong', misplaced)
@pytest.mark.parametrize('place', takes)
def test_a_loss_in_the_teachers_place(wrong, place):
    says = r'is a loss, not a teacher: the teacher comes first, KnowledgeDistillationCallback\(teacher, loss\)'
    with pytest.raises(TypeError, match=says): takes[place](misplaced[wrong])

def test_a_partial_is_a_function(teacher):
    assert isinstance(as_teacher(partial(teacher)), Called)         # of the inputs, whatever it is of, but for a loss

# ---- outputs ----

class Out(nn.Module):
    def __init__(self, m, f): super().__init__(); self.m,self.f = m,f
    def forward(self, x): return self.f(self.m(x))

@pytest.mark.parametrize('f,output', [
    (lambda o: (o,o.sum()),None), (lambda o: [o,3],None), (lambda o: dict(logits=o,loss=0),None), (lambda o: (0,o),1), (lambda o: (0,o),-1), (lambda o: dict(out=o),'out'), (lambda o: dict(a=[o]),lambda d: d['a'][0])],
    ids='tuple list logits position last key function'.split())
def test_outputs(teacher, f, output):
    "A tuple's first item and a dict's 'logits' by themselves, else `output`; of the teacher and of the student"
    for (x,),t in heard(Frozen(Out(teacher, f), output=output)): assert torch.equal(t, asked(teacher, x))
    def run(student, loss_func, **kwargs):
        learn = learner(student, loss_func=loss_func, metrics=[]); seed(3); learn.fit(1, cbs=KD(teacher, TaskLoss()+SoftTarget()+FitNet(), **kwargs)); return learn
    ce = CrossEntropyLossFlat()
    a = run(net(), ce)
    get = output if callable(output) else (lambda o: o['logits'] if isinstance(o, dict) else o[0]) if output is None else lambda o: o[output]
    b = run(Out(net(), f), PickedCE(get), output=output)
    assert_same(state(a.model), state(b.model.m))

class PickedCE(nn.CrossEntropyLoss):
    def __init__(self, get): super().__init__(); self.get = get
    def forward(self, pred, y): return super().forward(self.get(pred), y)

@pytest.mark.parametrize('f,output,has', [(lambda o: dict(a=o,b=o),None,"a dict with 'a', 'b'"), (lambda o: dict(a=o),'c',"a dict with 'a', which has no 'c'"), (lambda o: (o,),3,'1 items, which has no 3'), (lambda o: None,None,'a NoneType')])
def test_outputs_not_found(teacher, f, output, has):
    with pytest.raises(ValueError, match=f'the teacher returns {has}.*say where the prediction is'): heard(Frozen(Out(teacher, f), output=output))

# ---- inputs ----

def test_mean_std_size(teacher):
    "A bare module sees what the student sees; with `mean` and `std` its own normalisation, from the student's"
    m,s = .4,.25
    for (x,),t in heard(Frozen(teacher, mean=[m], std=[s], size=16)):
        z = F.interpolate((x-m)/s, (16,16), mode='bilinear', align_corners=False, antialias=True)
        torch.testing.assert_close(t, asked(teacher, z), rtol=1e-5, atol=1e-5)
    norm = Normalize.from_stats([.1],[.5], dim=1, cuda=False)
    for (x,),t in heard(Frozen(teacher, mean=[m], std=[s], size=(8,8)), learner(dls=get_dls(after_batch=[norm]))):
        torch.testing.assert_close(t, asked(teacher, (x*.5+.1-m)/s), rtol=1e-5, atol=1e-5)
        assert x.min().item()==pytest.approx(-.2)
    for (x,),t in heard(teacher, learner(dls=get_dls(after_batch=[norm]))): assert torch.equal(t, asked(teacher, x))

@pytest.mark.parametrize('mine,theirs', [((.1,.5),(.3,.2)), (None,(.3,.2)), ((.1,.5),None), ((.1,.5),(.1,.5)), (None,None)])
def test_normalisation_of_a_learner(teacher, mine, theirs):
    "A Learner's own statistics are met, whatever the student's"
    dls = lambda st: get_dls(after_batch=[Normalize.from_stats([st[0]],[st[1]], dim=1, cuda=False)] if st else None)
    (m0,s0),(m1,s1) = mine or (0,1),theirs or (0,1)
    for (x,),t in heard(learner(teacher, dls(theirs)), learner(dls=dls(mine))):
        torch.testing.assert_close(t, asked(teacher, (x*s0+m0-m1)/s1), rtol=1e-5, atol=1e-5)
        if mine==theirs: assert torch.equal(t, asked(teacher, x))

def test_maps_of_a_teacher_with_other_inputs(teacher):
    "Its layers are read in the same pass, at its own size"
    sizes = []
    learn = learner(); learn.fit(1, cbs=KD(Frozen(teacher, size=16), TaskLoss()+FitNet()+Watch(lambda fm_t, **k: sizes.append([o.shape[2] for o in fm_t.values()]))))
    assert len(sizes)==4 and sizes==[sizes[0]]*4 and left(learn, teacher)==[]

def two_inputs(n_inp=2, fs=(0,1)):
    items = [(X[i].flatten(),X[i].flatten().flip(0)*2,int(Y[i])) for i in range(96)]
    dl = partial(DataLoader, bs=32, device=torch.device('cpu'))
    dls = DataLoaders(dl(items, shuffle=True, drop_last=True), dl(items)); dls.n_inp = n_inp
    for o in dls.loaders: o.n_inp = n_inp
    return dls

class TwoInputs(nn.Module):
    def __init__(self, w): super().__init__(); self.a,self.b = nn.Linear(64, w),nn.Linear(64, w); self.fc = nn.Linear(w, 10)
    def forward(self, x, y): return self.fc((self.a(x)+self.b(y)).relu())

def test_two_inputs():
    seed(); t = TwoInputs(16)
    for (x,y),p in heard(t, learner(TwoInputs(4), two_inputs(), metrics=[])): assert torch.equal(p, asked(lambda_(t), (x,y)))
    one = nn.Sequential(nn.Linear(64,8),nn.ReLU(),nn.Linear(8,10))
    for inputs,f in ((1,lambda x,y: y), ([0],lambda x,y: x), (lambda x,y: x+y,lambda x,y: x+y), (lambda x,y: (x-y,),lambda x,y: x-y)):
        for (x,y),p in heard(Frozen(one, inputs=inputs), learner(TwoInputs(4), two_inputs(), metrics=[])): assert torch.equal(p, asked(one, f(x,y)))
    for (x,y),p in heard(Frozen(t, inputs=[1,0]), learner(TwoInputs(4), two_inputs(), metrics=[])): assert torch.equal(p, asked(lambda_(t), (y,x)))
    other = learner(one, DataLoaders(*(DataLoader([(X[i].flatten(),int(Y[i])) for i in range(96)], bs=32, device=torch.device('cpu')) for _ in range(2))), metrics=[])
    other.dls.n_inp = 1
    with pytest.raises(ValueError, match=r'takes 1 input\(s\), the student 2'): heard(other, learner(TwoInputs(4), two_inputs(), metrics=[]))

class lambda_(nn.Module):
    "Called with a tuple"
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, xs): return self.m(*xs)

def test_tabular():
    "fastai's own tabular model: categories and numbers, labels as a column"
    import pandas as pd
    from fastai.tabular.data import TabularDataLoaders
    from fastai.tabular.core import Categorify
    from fastai.tabular.model import TabularModel
    from fastai.data.block import CategoryBlock
    df = pd.DataFrame(dict(a=[str(i%3) for i in range(96)], b=X[:96].flatten(1)[:,20].numpy(), c=X[:96].flatten(1)[:,30].numpy(), y=[str(i) for i in Y[:96].tolist()]))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], cont_names=['b','c'], y_names='y', y_block=CategoryBlock(), valid_idx=list(range(64,96)), bs=32)
    seed(); t = TabularModel([(4,3)], 2, 10, [16]); s = TabularModel([(4,3)], 2, 10, [8])
    learn = Learner(dls, s, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KD(t, cb := TaskLoss()+SoftTarget()+(loss := Heard())))
    assert all(torch.equal(p, asked(lambda_(t), xb)) for xb,p in loss.said[1:]) and len(loss.said)==3 and left(learn, t)==[]

def test_language_model():
    "Tuple outputs reduced as RNNCallback reduces the student's; hidden state forgotten between epochs, and as it was afterwards"
    from fastai.callback.rnn import ModelResetter,RNNCallback
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder,SequentialRNN
    def lm(h, s): seed(s); return SequentialRNN(AWD_LSTM(20, 8, h, 2, hidden_p=0., input_p=0., embed_p=0., weight_p=.1), LinearDecoder(20, 8, output_p=0.))
    data = [(torch.randint(0, 20, (7,)),)*2 for _ in range(32)]
    dls = DataLoaders(*(DataLoader(data, bs=8, drop_last=True, device=torch.device('cpu')) for _ in range(2)))
    student,t = lm(10, 0),lm(12, 1)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(),RNNCallback()], opt_func=SGD, lr=.01)
    def run(n):
        loss = Heard()
        with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=KD(t, TaskLoss()+SoftTarget()+loss))
        return loss.said[1:]
    said = run(2)
    assert len(said)==8 and left(learn)==[]
    m = copy.deepcopy(t).eval()
    for e in range(2):
        m.reset()
        for (x,),p in said[4*e:4*e+4]:
            with torch.no_grad(): torch.testing.assert_close(p, m(x)[0])
    fresh = copy.deepcopy(t).eval(); fresh.reset()
    with torch.no_grad(): assert (fresh(said[1][0][0])[0]-said[1][1]).abs().max()>1e-5       # the state went on from batch to batch

# ---- classes ----

names = [f'c{i}' for i in range(10)]

def test_permuted_vocab(teacher):
    perm = [3,1,4,0,5,9,2,6,8,7]
    tl = learner(teacher, get_dls(vocab=[names[i] for i in perm], label=lambda y: f'c{y}'))
    for (x,),t in heard(tl, learner(dls=get_dls(vocab=names, label=lambda y: f'c{y}'))):
        want = asked(teacher, x)
        for j,name in enumerate(names): assert torch.equal(t[:,j], want[:,[names[i] for i in perm].index(name)])

def test_vocab_with_more_and_without(teacher):
    tl = learner(teacher, get_dls(vocab=names, label=lambda y: f'c{y}'))
    few = get_dls(vocab=['c7','c2','c5'], label=lambda y: f'c{(2,5,7)[y%3]}')
    for (x,),t in heard(tl, learner(net(classes=3), few)): assert torch.equal(t, asked(teacher, x)[:,[7,2,5]])
    more = get_dls(vocab=[*names,'cat','dog'], label=lambda y: f'c{y}')
    with pytest.raises(ValueError, match=r"the teacher does not know 2 of the student's 12 classes: 'cat', 'dog'; it knows 'c0'"): heard(tl, learner(net(classes=12), more))

def test_classes_said(teacher):
    three = lambda: learner(net(classes=3), get_dls(vocab=['c7','c2','c5'], label=lambda y: f'c{(2,5,7)[y%3]}'))
    for classes in ([7,2,5], names):
        for (x,),t in heard(Frozen(teacher, classes=classes), three()): assert torch.equal(t, asked(teacher, x)[:,[7,2,5]])
    with pytest.raises(ValueError, match='classes= asks for output 12, the teacher has 10'): heard(Frozen(teacher, classes=[1,2,12]), three())
    with pytest.raises(ValueError, match=r"does not know 1 of the student's 3 classes: 'c7'"): heard(Frozen(teacher, classes=[n for n in names if n!='c7']), three())
    with pytest.raises(ValueError, match='the same classes are expected'): learner().fit(1, cbs=KD(Frozen(teacher, classes=[1,2]), SoftTarget()))

def test_numbered_classes_in_another_order(teacher):
    "Whole numbers as classes are names too, if a Learner's vocab says them"
    perm = [3,1,4,0,5,9,2,6,8,7]
    for (x,),t in heard(learner(teacher, get_dls(vocab=perm))): assert torch.equal(t, asked(teacher, x)[:,[perm.index(i) for i in range(10)]])

def test_tokens_differ(teacher):
    def text(tokens):
        dls = get_dls(); dls.vocab = [tokens,list(range(10))]
        return dls
    a,b = ['xxunk','the','cat'],['xxunk','the','dog','cat']
    for (x,),t in heard(learner(teacher, text(a)), learner(dls=text(a))): assert torch.equal(t, asked(teacher, x))
    with pytest.raises(ValueError, match=r"the student does not know 1 of the teacher's 4 tokens: 'dog'; .*Make the student's data with the teacher's vocab"): heard(learner(teacher, text(b)), learner(dls=text(a)))

@pytest.mark.parametrize('loss_func,act,back', [(CrossEntropyLossFlat(),lambda o: o.softmax(1),lambda o: o.log_softmax(1)), (BCEWithLogitsLossFlat(),torch.sigmoid,lambda o: o)])
def test_probabilities(teacher, loss_func, act, back):
    for (x,),t in heard(Frozen(Out(teacher, act), probabilities=True), kind(loss_func)): torch.testing.assert_close(t, back(asked(teacher, x)), rtol=1e-4, atol=1e-4)

# ---- several ----

def kind(loss_func, student=None):
    "A Learner with labels that suit the loss function"
    if isinstance(loss_func, CrossEntropyLossFlat): return learner(student, loss_func=loss_func, metrics=[])
    items = [(X[i],F.one_hot(Y[i], 10).float()) for i in range(96)]
    dls = DataLoaders(*(DataLoader(items, bs=32, drop_last=True, device=torch.device('cpu')) for _ in range(2)))
    return learner(student, dls, loss_func=loss_func, metrics=[])

@pytest.mark.parametrize('loss_func,what', [(CrossEntropyLossFlat(),'log of the mean probability'), (BCEWithLogitsLossFlat(),'logit of the mean sigmoid'), (MSELossFlat(),'mean of the values')], ids=['single','multi','regression'])
def test_ensemble(loss_func, what):
    ts = [net(w, s=w) for w in (4,6,8)]
    for t in ts: t.fc.weight.data *= 20
    learn = kind(loss_func)
    assert what in repr(KD(ts).plan(learn))
    for (x,),got in heard(ts, learn):
        zs = [asked(t, x).double() for t in ts]
        for b in range(0, 32, 5):
            if what.startswith('log '): want = (sum(z[b].exp()/z[b].exp().sum() for z in zs)/3).log()
            elif what.startswith('logit'): p = sum(1/(1+(-z[b]).exp()) for z in zs)/3; want = (p/(1-p)).log()
            else: want = sum(z[b] for z in zs)/3
            torch.testing.assert_close(got[b].double(), want, rtol=2e-4, atol=2e-4)
    assert left(learn, *ts)==[]
    learn.fit(1, cbs=KD(ts)); assert left(learn, *ts)==[]                # with the loss that suits

def test_ensemble_of_one_is_the_teacher(teacher):
    for (x,),t in heard([teacher]): torch.testing.assert_close(t.softmax(1), asked(teacher, x).softmax(1))

def test_ensemble_of_kinds(teacher, tmp_path):
    "Each brings its own inputs and classes"
    perm = [3,1,4,0,5,9,2,6,8,7]
    tl = learner(net(6, s=2), get_dls(vocab=perm, after_batch=[Normalize.from_stats([.3],[.2], dim=1, cuda=False)]))
    for (x,),t in heard([teacher, tl, lambda x: torch.zeros(len(x), 10)]):
        want = (asked(teacher, x).softmax(1)+asked(tl.model, (x-.3)/.2).softmax(1)[:,[perm.index(i) for i in range(10)]]+.1)/3
        torch.testing.assert_close(t, want.log(), rtol=1e-4, atol=1e-4)

def test_ensemble_of_doubles():
    "What is finer than float32 stays so, what is coarser is averaged in float32"
    for dtype,want in ((torch.float64,torch.float64),(torch.float16,torch.float32),(torch.int64,torch.float32)):
        z = torch.tensor([[1,2]]).to(dtype)
        assert Ensemble([lambda x: z, lambda x: z], kind='regression').forward((X[:1],)).dtype==want

def test_ensemble_refuses(teacher):
    for loss in (lambda: TaskLoss()+FitNet(), lambda: Attention(), lambda: TaskLoss()+Watch()):
        with pytest.raises(ValueError, match='reads the layers of one network, which Ensemble'): KD([teacher,net(4)], loss())
    with pytest.raises(ValueError, match=r'return \(32, 10\) and \(32, 7\)'): heard([teacher,net(8, classes=7)])
    learn = learner(loss_func=lambda p,y: F.cross_entropy(p, y), metrics=[])
    with pytest.raises(ValueError, match='how to average an ensemble.*kind='): heard([teacher,net(4)], learn)
    heard(Ensemble([teacher,net(4)], kind='single'), learner(loss_func=lambda p,y: F.cross_entropy(p, y), metrics=[]))

@pytest.mark.parametrize('loss,loss_func', [(SoftTarget,BCEWithLogitsLossFlat()), (SoftTarget,MSELossFlat()), (BinarySoftTarget,CrossEntropyLossFlat()), (BinarySoftTarget,MSELossFlat())])
def test_loss_that_does_not_suit(teacher, loss, loss_func):
    learn = kind(loss_func); was = state(learn.model)
    with pytest.raises(ValueError, match='use (Logits|BinarySoftTarget|SoftTarget)'): learn.fit(1, cbs=KD(teacher, loss()))
    assert_same(was, state(learn.model)); assert left(learn, teacher)==[]
