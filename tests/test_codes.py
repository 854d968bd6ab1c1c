"""Teachers that read other codes: what a teacher is given and says is what its own data and its own Learner make of
the raw rows and texts; the rest is refused by name. Then Hugging Face models, whose outputs are dicts, as both."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from common import (KD,X,asked,assert_same,cpu,hf_vit,learner,left,loud,lstm,net,refuses,rnn,seed,state,
                    tuples)
from fastai.data.block import CategoryBlock,DataBlock,RegressionBlock
from fastai.data.transforms import ColReader,IndexSplitter
from fastai.losses import CrossEntropyLossFlat,MSELossFlat
from fastai.tabular.core import Categorify,FillMissing,FillStrategy,Normalize,TabularPandas,TabularProc
from fastai.tabular.data import TabularDataLoaders  # noqa: F401, gives the DataLoaders their test_dl
from fastai.tabular.model import TabularModel,get_emb_sz
from fastai.text.core import BaseTokenizer,Tokenizer
from fastai.text.data import Pad_Chunk,TextBlock
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_clas_config,awd_lstm_lm_config
from fastai.text.models.core import get_language_model,get_text_classifier
from fastcore.basics import noop
from torch import nn
from transformers import (BertConfig,BertForSequenceClassification,BertModel,GPT2Config,
                          GPT2ForSequenceClassification)

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.teachers.teacher import Frozen


class Heard(DistillLoss):
    "Keeps what the teacher says of which items, and what the student was given"
    def __init__(self): self.said = []
    def forward(self, pred, teacher_pred, xb, idx):
        self.said.append((idx,teacher_pred,xb))
        return (pred.mean()-teacher_pred.mean())**2

def heard(teacher, learn):
    "`(positions of the items, the teacher's prediction, the student's inputs)` for each batch of a fit"
    loss = Heard()
    seed(3)
    learn.fit(1, cbs=KD(teacher, TaskLoss()+loss))
    assert left(learn)==[]
    assert len(loss.said)>2
    return loss.said[1:]                                   # the first is the trial

def rejected(teacher, learn, match): refuses(learn, match, KD(teacher, TaskLoss()+SoftTarget()))

def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

# ---- tables ----

def rows(n=90, s=0, cats='xyz', gaps=('c',), scale=1.):
    r = np.random.default_rng(s)
    d = pd.DataFrame(dict(
        a=r.choice([*cats], n), b=r.integers(0, 4, n), c=r.normal(5, 3*scale, n), d=r.normal(-2, scale, n),
        e=r.integers(1990, 2030, n), y=r.choice(['no','yes'], n)))
    for k,g in enumerate(gaps): d.loc[k::7+k,g] = np.nan
    d.loc[3::13,'a'] = None
    return d

def theirs(cats='xyz', gaps=('c',), scale=1.):
    "Rows that the teacher learned from"
    return rows(120, 1, cats, gaps, scale)

def procs(): return [Categorify,FillMissing,Normalize]

def table(d, procs, cats=('a','b'), conts=('c','d','e'), **kwargs):
    "Loaders of these rows, the last 20 of them to validate"
    n = len(d)-20
    to = TabularPandas(d, procs=procs, cat_names=[*cats], cont_names=[*conts], y_names='y', y_block=CategoryBlock(),
                       splits=[[*range(n)],[*range(n, len(d))]], **kwargs)
    return to.dataloaders(bs=16, device=cpu)

def tabular(dls, w=16, s=0):
    seed(s)
    to = dls.train_ds
    model = TabularModel(get_emb_sz(to), len(to.cont_names), len(dls.vocab), [w])
    return learner(loud(model), dls, metrics=[])

def own(teacher, d, to):
    "What the teacher's Learner makes of the raw rows in the student's training set: codes, numbers and predictions"
    dl = teacher.dls.test_dl(d.drop(columns='y').loc[to.items.index])
    cat,cont = (torch.cat(o) for o in zip(*((b[0],b[1]) for b in dl)))
    return cat,cont,teacher.get_preds(dl=dl, act=noop)[0]

def same_inputs(got, cat, cont):
    "Codes equal, numbers but for the rounding of the student's"
    assert torch.equal(got[0], cat)
    torch.testing.assert_close(got[1], cont, rtol=1e-6, atol=1e-6)

def check(teacher, d, dls, frozen=None):
    "The teacher's codes, and so what the network makes of them, are those of its own Learner"
    frozen = frozen or Frozen(teacher)
    cat,cont,want = own(teacher, d, dls.train_ds)
    for idx,p,xb in heard(frozen, tabular(dls, 4, 1)):
        same_inputs(frozen.inp(*xb), cat[idx], cont[idx])
        close(p, want[idx])
    assert want.std(0).min()>.1                             # rows are told apart

def constants(): return FillMissing(fill_strategy=FillStrategy.constant, fill_vals={'c':-50., 'e':0})
cases = dict(
    statistics=lambda d: table(d, procs()),
    order=lambda d: table(d, procs(), 'ba', 'ecd'),
    more=lambda d: table(d.assign(f=d.d**2, g=d.b.astype(str)), procs(), 'gab', 'fcde'),
    raw=lambda d: table(d, [Categorify,FillMissing]),
    fill=lambda d: table(d, [Categorify,constants(),Normalize]),
    float64=lambda d: table(d, procs(), reduce_memory=False))

@pytest.mark.parametrize('steps', [procs,lambda: [Categorify,FillMissing]], ids=['normalised','not'])
@pytest.mark.parametrize('case', cases)
def test_table(case, steps):
    "Other categories, orders, statistics and fills: as the teacher's Learner predicts the raw rows"
    teacher,d = tabular(table(theirs('wzxyv', scale=2.), steps())),rows()
    check(teacher, d, cases[case](d))

def test_table_unconverted_is_nonsense():
    "What the test above would see if nothing were converted"
    teacher,d = tabular(table(theirs('wzxyv', scale=2.), procs())),rows()
    dls = table(d, procs())
    want = own(teacher, d, dls.train_ds)[2]
    for idx,p,_ in heard(copy.deepcopy(teacher.model), tabular(dls, 4, 1)):
        assert (p-want[idx]).abs().max()>.1

def test_table_the_same():
    "Nothing to convert: the student's batch, to the last bit"
    d = rows()
    t,student = Frozen(tabular(table(d, procs()))),tabular(table(d, procs()), 4, 1)
    t.setup(student)
    b = student.dls.one_batch()
    assert all(x is y for x,y in zip(t.inp(*b[:2]), b[:2], strict=True))

def test_table_exported(tmp_path):
    "The file of a Learner says what a Learner does, and a second fit with other data what that needs"
    teacher,d = tabular(table(theirs('wzxyv', gaps='ce'), procs())),rows()
    teacher.path = tmp_path
    teacher.export('t.pkl')
    f = Frozen(tmp_path/'t.pkl')
    for case in ('fill','order','more','raw'): check(teacher, d, cases[case](d), f)

@pytest.mark.parametrize('gaps,add_col', [('cd',True), ('cde',True), ('c',False)])
def test_table_that_the_student_has_no_gaps_in(gaps, add_col):
    "Columns that were only ever missing for the teacher: its `_na` columns are all False"
    steps = [Categorify,FillMissing(add_col=add_col),Normalize]
    teacher,d = tabular(table(theirs(gaps=gaps), steps)),rows(gaps=())
    assert (teacher.dls.cat_names[2:]==[f'{g}_na' for g in gaps])==add_col
    check(teacher, d, table(d, [Categorify,Normalize]))
    check(teacher, d, table(d, procs()))

def test_table_with_other_gaps():
    "Each of both columns missing, filled with other medians; the flags come in another order"
    teacher,d = tabular(table(theirs(gaps='cde'), procs())),rows(gaps='ec')
    dls = table(d, procs(), conts='ecd')
    assert teacher.dls.cat_names[2:]==['c_na','d_na','e_na']
    assert dls.cat_names[2:]==['e_na','c_na']
    check(teacher, d, dls)

def test_table_with_nan():
    "A student that fills nothing hands on NaN, which the teacher's fills take the place of"
    teacher,d = tabular(table(theirs(), procs())),rows()
    student = tabular(table(d, [Categorify,Normalize]), 4, 1)
    t = Frozen(teacher)
    t.setup(student)
    dl = student.dls.train.new(shuffle=False, drop_last=False)
    assert d.loc[dl.dataset.items.index].c.isna().any()
    cat,cont,want = own(teacher, d, dl.dataset)
    for k,b in enumerate(dl):
        at = slice(16*k, 16*k+16)
        same_inputs(t.inp(*b[:2]), cat[at], cont[at])
        close(t.forward(b[:2]), want[at])
    t.close()

def test_table_same_fill_without_flags():
    "Where both fill with the same number it does not matter where"
    def fill(): return FillMissing(fill_strategy=FillStrategy.constant, fill_vals={'c':4.}, add_col=False)
    teacher,d = tabular(table(theirs(), [Categorify,fill(),Normalize])),rows()
    check(teacher, d, table(d, [Categorify,fill(),Normalize]))

def test_table_categories_that_do_not_occur():
    "A category of the student's vocab that is only in its validation rows is no reason to refuse"
    d = rows()
    d.loc[len(d)-3,'a'] = 'other'
    dls = table(d, procs())
    assert 'other' in dls.classes['a']
    check(tabular(table(theirs(), procs())), d, dls)

def test_table_numbers_as_categories():
    "Categories are equal as pandas finds them equal: 1 and 1.0, but not '1'"
    teacher,d = theirs(),rows()
    teacher['b'] = teacher.b.astype(float)
    check(tabular(table(teacher, procs())), d, table(d, procs()))
    teacher['b'] = teacher.b.astype(int).astype(str)
    refused(table(teacher, procs()), table(d, procs()),
            "in 'b' the teacher does not know 0, 1, 2, 3; it knows '0', '1', '2', '3'")

def test_table_classes():
    "The classes of the target are met by name too"
    t,d = theirs(),rows()
    t['y'] = t.y.map(dict(no='zero', yes='one'))
    t.loc[::5,'y'] = 'two'
    d['y'] = d.y.map(dict(no='zero', yes='two'))
    teacher,dls = tabular(table(t, procs())),table(d, procs())
    assert list(teacher.dls.vocab)==['one','two','zero']
    assert list(dls.vocab)==['two','zero']
    want = own(teacher, d, dls.train_ds)[2]
    for idx,p,_ in heard(teacher, tabular(dls, 4)): close(p, want[idx][:,[1,2]])
    rejected(tabular(dls), tabular(table(t, procs())),
             "does not know 1 of the student's 3 classes: 'one'; it knows 'two', 'zero'")

def test_table_layers():
    "Losses that read the teacher's layers see it run on its own codes"
    teacher,d = tabular(table(theirs('wzxyv'), procs())),rows()
    dls = table(d, procs(), 'ba', 'ecd')
    student,seen,want = tabular(dls, 4, 1),[],[]
    class Layers(DistillLoss):
        layers = 'layers.0'
        def forward(self, fm_t, idx, xb, teacher):
            again = teacher(*xb, bn='eval')
            seen.append((idx,fm_t['layers.0'],again.fm['layers.0']))
            return 0*fm_t['layers.0'].sum()
    student.fit(1, cbs=KD(teacher, TaskLoss()+Layers()))
    h = teacher.model.layers[0].register_forward_hook(lambda m,i,o: want.append(o))
    own(teacher, d, dls.train_ds)
    h.remove()

    want = torch.cat(want)
    assert len(seen)>3
    for idx,a,again in seen[1:]:
        close(a, want[idx])
        assert torch.allclose(a, again, atol=1e-6)

class Log(TabularProc):
    def encodes(self, to): to['e'] = np.log(to['e'])

def refused(theirs, mine, match, **kwargs): rejected(Frozen(tabular(theirs), **kwargs), tabular(mine, 4, 1), match)

def blind():
    "Steps that fill what is missing and do not say where"
    return [Categorify,FillMissing(add_col=False),Normalize]

whole = rows(120, 1, gaps=())
unlike = [                                                 # the teacher's table, the student's, and what is said
    (lambda d,t: (table(t, procs()), table(rows(cats='xyzuw'), procs())),
     r"in 'a' the teacher does not know 'u', 'w'; it knows 'x', 'y', 'z'$"),
    (lambda d,t: (table(t, procs()), table(d, procs(), 'b', 'ce')),
     r"'a' is missing; the student has 'b', 'c_na', 'c', 'e'; 'd' is missing"),
    (lambda d,t: (table(t, procs()), table(d, procs(), 'abe', 'cd')),
     "'e' is a category for the student and a number for the teacher"),
    (lambda d,t: (table(t, procs(), 'abe', 'cd'), table(d, procs())),
     "'e' is a number for the student and a category for the teacher"),
    (lambda d,t: (table(t, procs()), table(d, blind())),
     r"'c_na' is not in the student's, which fills missing values of 'c' and does not say where: "
     r"FillMissing\(add_col=True\) does"),
    (lambda d,t: (table(t, blind()), table(d, blind())),
     r"missing values of 'c' are filled with [\d.]+ for the student and [\d.]+ for the teacher, "
     "and where is not said"),
    (lambda d,t: (table(whole, procs()), table(d, procs())),
     "'c' has missing values in the student's data, and had none in the teacher's"),
    (lambda d,t: (table(t, [*procs(),Log]), table(d, procs())),
     r"it goes through no other steps \(the student's\); it goes through 'Log' \(the teacher's\)")]

def test_table_refused():
    d,t = rows(),theirs()
    for tables,match in unlike: refused(*tables(d, t), match)

    raw = learner(TabularModel([(5,3)], 2, 2, [8]), table(whole, [Normalize], 'b', 'ce'))
    rejected(raw, tabular(table(rows(gaps=()), procs(), 'b', 'ce'), 4, 1), "'b' does not go through Categorify")
    refused(table(t, procs()), table(d, procs()), 'the columns of a table are found by name', inputs=[0,1])

def test_table_by_hand():
    "A function of the inputs makes what the teacher reads itself"
    t,d = tabular(table(theirs(), procs())),rows(cats='xyzuw')
    frozen = Frozen(t, inputs=lambda cat,cont: (cat.clamp(max=2),-cont))
    for idx,p,(cat,cont) in heard(frozen, tabular(table(d, procs()), 4, 1)):
        torch.testing.assert_close(p, asked(t.model, cat.clamp(max=2), -cont))

# ---- texts ----

words = 'the cat sat on a mat dog ran far away home red blue green'.split()
def texts(words=words, n=80, s=0):
    r = np.random.default_rng(s)
    text = [' '.join(r.choice(words, r.integers(3, 9))) for _ in range(n)]
    return pd.DataFrame(dict(text=text, label=r.choice(['neg','pos'], n), r=r.normal(size=n)))

def text_dls(d, vocab=None, y=CategoryBlock, get_y='label', **kwargs):
    "Loaders of texts; `y=None` for a language model"
    block = TextBlock(Tokenizer(BaseTokenizer()), vocab=vocab, min_freq=1, seq_len=6, is_lm=y is None)
    data = DataBlock(
        block if y is None else (block,y), get_x=ColReader('text'), get_y=None if y is None else ColReader(get_y),
        splitter=IndexSplitter(range(len(d)-16, len(d))))
    if vocab and y is not None:
        kwargs = dict(before_batch=Pad_Chunk(seq_len=6, pad_idx=[*vocab].index('xxpad')))|kwargs
    seed()
    return data.dataloaders(d, bs=16, device=cpu, drop_last=True, **kwargs)

class Bag(nn.Module):
    "The mean embedding of the tokens that are no padding"
    def __init__(self, n, w, out=2, pad=1):
        super().__init__()
        self.pad,self.e,self.fc = pad,nn.Embedding(n, w),nn.Linear(w, out)
    def forward(self, x):
        m = (x!=self.pad)[...,None]
        return self.fc((self.e(x)*m).sum(1)/m.sum(1))

def bag(dls, w=16, s=0, out=2, **kwargs):
    seed(s)
    v = dls.vocab if out==1 else dls.vocab[0]
    return learner(loud(Bag(len(v), w, out, list(v).index('xxpad'))), dls, metrics=[], **kwargs)

def shuffled(vocab, s=2):
    "The tokens in another order but for the first, which is what an unknown one becomes"
    r = np.random.default_rng(s)
    return [vocab[0],*r.permutation(vocab[1:]).tolist()]

def of_texts(teacher, d):
    "What the teacher's Learner predicts of the raw texts in the student's training set"
    return teacher.get_preds(dl=teacher.dls.test_dl(d.text[:-16].tolist()), act=noop)[0]

@pytest.mark.parametrize('extra', [[],['yellow','very']], ids=['permuted','more'])
def test_tokens(extra, tmp_path):
    "Another order of tokens, and tokens that the teacher reads as unknown: as its Learner predicts the raw texts"
    d = texts(words+extra)
    dls = text_dls(d)
    vocab = shuffled([o for o in text_dls(texts(s=1)).vocab[0] if o!='xxfake'])
    teacher = bag(text_dls(texts(s=1), vocab=vocab))
    teacher.path = tmp_path
    teacher.export('t.pkl')
    assert vocab.index('xxpad')>1
    assert not extra or 'very' not in vocab

    want = of_texts(teacher, d)
    for o in (teacher,tmp_path/'t.pkl'):
        for idx,p,_ in heard(o, bag(dls, 4, 1)): close(p, want[idx])
    unconverted = text_dls(d, vocab=list(dls.vocab[0])[:len(vocab)])
    for idx,p,_ in heard(copy.deepcopy(teacher.model), bag(unconverted, 4, 1)):
        assert (p-want[idx]).abs().max()>.1

def test_token_ids():
    "Number by number, as the teacher's own Numericalize has them"
    d = texts(words+['yellow'])
    teacher = bag(text_dls(texts(s=1), vocab=shuffled(text_dls(texts(s=1)).vocab[0])))
    t,student = Frozen(teacher),bag(text_dls(d), 4, 1)
    t.setup(student)
    numbers,pad = teacher.dls.train_ds.tls[0].tfms,list(teacher.dls.vocab[0]).index('xxpad')
    for idx,_,(x,) in heard(teacher, student):
        for i,row in zip(idx.tolist(), t.inp(x)[0], strict=True):
            assert row[row!=pad].tolist()==numbers(d.iloc[i]).tolist()
    t.close()

def reader_of(dls, w, s):
    "A recurrent classifier of texts"
    seed(s)
    model = get_text_classifier(AWD_LSTM, len(dls.vocab[0]), 2, seq_len=6, config=awd_lstm_clas_config|lstm(w),
                                lin_ftrs=[w])
    return learner(model, dls, metrics=[], cbs=rnn())

def renumbered(x, mine, vocab):
    "Numbers of the vocab `mine` as those of `vocab`"
    return torch.tensor([[vocab.index(mine[i]) for i in row] for row in x.tolist()])

def test_tokens_of_a_recurrent_teacher():
    "AWD_LSTM finds its padding by number"
    d = texts()
    dls = text_dls(d)
    mine = dls.vocab[0]
    vocab = list(mine[:2])+shuffled(mine[2:])
    teacher = reader_of(text_dls(d, vocab=vocab), 6, 0)
    m = reader_of(teacher.dls, 6, 0).model.eval()          # the same weights: fastai's WeightDropout cannot be copied
    for _,p,(x,) in heard(teacher, reader_of(dls, 4, 1)):
        m.reset()
        with torch.no_grad(): want = m(renumbered(x, mine, vocab))[0]
        torch.testing.assert_close(p, want)

def test_tokens_refused():
    d,t = texts(words[:-2]),bag(text_dls(texts(s=1)))
    rejected(t, bag(text_dls(d), 4, 1),
             "the student does not know 2 of the teacher's 24 tokens: '(blue|green)', '(blue|green)'; "
             ".*Make the student's data with the teacher's vocab")
    want = of_texts(t, d)                                  # what the error says helps
    for idx,p,_ in heard(t, bag(text_dls(d, vocab=t.dls.vocab[0]), 4, 1)): close(p, want[idx])

class Pieces:
    "A tokenizer of pairs of letters"
    def __call__(self, items): return ([w[i:i+2] for w in t.split() for i in range(0, len(w), 2)] for t in items)

def test_other_tokenizer_refused():
    "Pieces of words are tokens that a student of whole words does not know"
    block = TextBlock(Tokenizer(Pieces()), min_freq=1, seq_len=6)
    data = DataBlock((block,CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'))
    dls = data.dataloaders(texts(), bs=16, device=cpu)
    rejected(bag(dls), bag(text_dls(texts()), 4, 1), "the student does not know .* of the teacher's")

def test_padding_with_a_word_refused():
    "fastai pads with 1 whatever the vocab says"
    vocab = shuffled(text_dls(texts()).vocab[0])
    dls = text_dls(texts(), vocab, before_batch=Pad_Chunk(seq_len=6))
    match = f"texts are padded with the number 1, which is '{vocab[1]}' in its vocab"
    assert vocab.index('xxpad')!=1
    rejected(bag(dls), bag(text_dls(texts()), 4, 1), f"the teacher's {match}")
    rejected(bag(text_dls(texts())), bag(dls, 4, 1), f"the student's {match}")

def test_tokens_by_hand():
    "A function of the inputs makes the teacher's numbers itself"
    t,dls = bag(text_dls(texts(s=1))),text_dls(texts(words[:-2]))
    for _,p,(x,) in heard(Frozen(t, inputs=lambda x: x.flip(1)), bag(dls, 4, 1)):
        torch.testing.assert_close(p, asked(t.model, x.flip(1)))

def test_text_regression():
    "The only vocab is that of the tokens, which the output has nothing to do with"
    d,numbers = texts(),dict(y=RegressionBlock, get_y='r')
    vocab = shuffled(text_dls(d).vocab[0])
    teacher = bag(text_dls(d, vocab=vocab, **numbers), out=1, loss_func=MSELossFlat())
    student = bag(text_dls(d, **numbers), 4, 1, out=1, loss_func=MSELossFlat())
    want = of_texts(teacher, d)
    for idx,p,_ in heard(teacher, student): close(p, want[idx])

def lm(dls, w, s):
    seed(s)
    return learner(get_language_model(AWD_LSTM, len(dls.vocab), config=awd_lstm_lm_config|lstm(w)), dls,
                   metrics=[], cbs=rnn())

class Said(DistillLoss):
    "Keeps what the teacher says, and to what; it is not told which items these are"
    def __init__(self): self.said = []
    def forward(self, pred, teacher_pred, xb):
        self.said.append((xb[0],teacher_pred))
        return (pred.mean()-teacher_pred.mean())**2

def places(vocab, fake): return [i for i,o in enumerate(vocab) if (o=='xxfake')==fake]

@pytest.mark.parametrize('same', [False,True])
def test_language_model(same):
    """What it reads and what it predicts are the same tokens, found by name;
    'xxfake', which fills up the vocab, stands there more than once"""
    d = texts()
    mine = list(text_dls(d, y=None).vocab)
    mine += ['xxfake']*(27-len(mine))
    vocab = mine if same else shuffled(mine)
    assert mine.count('xxfake')>2
    teacher,student = lm(text_dls(texts(s=1), vocab, y=None), 6, 0),lm(text_dls(d, mine, y=None), 4, 1)
    m,loss = lm(teacher.dls, 6, 0).model.eval(),Said()
    student.fit(1, cbs=KD(teacher, TaskLoss()+loss))

    assert left(student)==[]
    assert len(loss.said)>3
    m.reset()
    for x,p in loss.said[1:]:
        with torch.no_grad(): want = m(renumbered(x, mine, vocab))[0]
        for i in places(mine, False): torch.testing.assert_close(p[...,i], want[...,vocab.index(mine[i])])
        torch.testing.assert_close(p[...,places(mine, True)], want[...,places(vocab, True)])

def test_language_model_refused():
    a,b = (text_dls(texts(w), y=None) for w in (words,words[:-2]))
    rejected(lm(a, 6, 0), lm(b, 4, 1), r"the student does not know 2 of the teacher's \d+ tokens")
    rejected(lm(b, 6, 0), lm(a, 4, 1), r"the teacher does not know 2 of the student's \d+ tokens: "
             "'(blue|green)', '(blue|green)'; it knows 'xxunk'")

# ---- Hugging Face ----

small = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=20)

def bert(s=0):
    seed(s)
    return loud(BertForSequenceClassification(BertConfig(**small, num_labels=2)))

def ids(n=96):
    "Numbers of tokens, some sequences filled up with 0"
    x = torch.randint(1, 30, (n,9), generator=torch.Generator().manual_seed(0))
    x[::3,6:] = 0
    return tuples(x, x.sum(1)%2, n=80, valid=n-80, bs=16, shuffle=True, drop_last=True)

def reader(model=None):
    "A student of those numbers"
    seed(1)
    return learner(model or Bag(30, 4, pad=0), ids(), metrics=[])

def mask(x): return (x!=0).long()

def test_vit_teaches():
    t = hf_vit()
    assert isinstance(t(X[:2]), dict)
    for idx,p,(x,) in heard(t, learner(metrics=[])): assert torch.equal(p, asked(t, pixel_values=x).logits)

def output_of(model, name, x):
    "What a layer returns in evaluation"
    m,got = copy.deepcopy(model).eval(),[]
    m.get_submodule(name).register_forward_hook(lambda m,i,o: got.append(o))
    with torch.no_grad(): m(x)
    return got[0]

def second_layer(t):
    "Its name, and the name of the tensor that it returns, which may be in a tuple"
    ends = 'vit.layers.1','encoder.layer.1'                      # named so in transformers 5 and 4
    name = next(n for n,_ in t.named_modules() if n.endswith(ends))
    return name,name if isinstance(output_of(t, name, X[:2]), torch.Tensor) else f'{name}[0]'

def first(o): return o if isinstance(o, torch.Tensor) else o[0]

def test_vit_layers():
    "Hints from a layer by its name, next to the prediction"
    t,seen = hf_vit(),[]
    name,layer = second_layer(t)
    class Look(DistillLoss):
        def forward(self, fm_t, xb):
            seen.append((xb[0],fm_t[layer]))
            return 0*fm_t[layer].sum()
    learn,was = learner(metrics=[]),state(t)
    kd = KD(t, TaskLoss()+SoftTarget()+FitNet().at('layer2', layer)+Look().at(layer))
    learn.fit(1, cbs=kd)

    for x,z in seen: torch.testing.assert_close(z, first(output_of(t, name, x)))
    assert seen[0][1].shape==(32,17,16)
    assert kd.parts['fit_net']>0
    assert left(learn, t)==['teacher mode']*(not hf_vit().training)
    assert_same(was, state(t))

def backwards(x): return torch.arange(x.shape[1]).flip(0)[None]

@pytest.mark.parametrize('inputs,by_hand', [
    (None, lambda m,x: m(x)),
    (lambda x: dict(input_ids=x, attention_mask=mask(x)), lambda m,x: m(input_ids=x, attention_mask=mask(x))),
    (lambda x: dict(attention_mask=mask(x), input_ids=x), lambda m,x: m(input_ids=x, attention_mask=mask(x))),
    (lambda x: dict(position_ids=backwards(x), input_ids=x), lambda m,x: m(input_ids=x, position_ids=backwards(x)))],
    ids=['bare','mask','order','with gaps'])
def test_bert_teaches(inputs, by_hand):
    t = bert()
    said = heard(Frozen(t, inputs=inputs), reader())
    own = copy.deepcopy(t).eval()
    with torch.no_grad():
        for _,p,(x,) in said: torch.testing.assert_close(p, by_hand(own, x).logits)
        if inputs is not None: assert any((p-own(x).logits).abs().max()>1e-3 for _,p,(x,) in said)

def test_bert_layers():
    "Layers of a network that is called by name"
    t,seen,layer = bert(),[],'bert.embeddings'
    class Look(DistillLoss):
        def forward(self, fm_t, xb, teacher):
            seen.append((xb[0],fm_t[layer],teacher(*xb).fm[layer]))
            return 0*fm_t[layer].sum()
    def inputs(x): return dict(input_ids=x, token_type_ids=(x>9).long(), attention_mask=mask(x))
    learn = reader()
    learn.fit(1, cbs=KD(Frozen(t, inputs=inputs), TaskLoss()+SoftTarget()+Look().at(layer)))

    for x,z,again in seen:
        torch.testing.assert_close(z, asked(t.bert.embeddings, input_ids=x, token_type_ids=(x>9).long()))
        assert torch.equal(z, again)
    assert len(seen)==6
    assert left(learn)==[]

def test_gpt2_teaches():
    "The mask is its third argument"
    seed()
    t = loud(GPT2ForSequenceClassification(GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=20, num_labels=2, pad_token_id=0)))
    def inputs(x): return dict(input_ids=x, attention_mask=mask(x))
    for _,p,(x,) in heard(Frozen(t, inputs=inputs), reader()):
        torch.testing.assert_close(p, asked(t, **inputs(x)).logits)

def test_function_around_a_model():
    "What a function hands on may be such a dict too, or a tuple"
    t = bert().eval()
    for f in (lambda x: t(x, attention_mask=mask(x)), lambda x: t(x, attention_mask=mask(x), return_dict=False)):
        for _,p,(x,) in heard(f, reader()): torch.testing.assert_close(p, asked(t, x, attention_mask=mask(x)).logits)

def test_argument_that_is_not_there():
    t = Frozen(bert(), inputs=lambda x: dict(input_ids=x, attention_msk=x))
    rejected(t, reader(), "inputs= returns 'attention_msk', which BertForSequenceClassification does not take; "
             "it takes 'input_ids', 'attention_mask'")

class Sixteen(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = Bag(30, 4, 16, 0)
    def forward(self, x): return self.m(x)

def test_model_without_a_head():
    seed()
    t = BertModel(BertConfig(**small))
    rejected(t, reader(), "the teacher returns a dict with 'last_hidden_state', 'pooler_output': "
             "say where the prediction is with output=")
    for _,p,(x,) in heard(Frozen(t, output='pooler_output'), reader(Sixteen())):
        torch.testing.assert_close(p, asked(t, x).pooler_output)

class OfLogits(nn.CrossEntropyLoss):
    def forward(self, pred, y): return super().forward(pred['logits'], y)

class Bare(nn.Module):
    "A Hugging Face model that answers with its logits"
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x): return self.m(x).logits

@pytest.mark.parametrize('output', [None,'logits'])
def test_vit_learns(output):
    "As a student it learns what the same network without the dict does"
    def run(student, loss_func, output=None):
        learn = learner(student, loss_func=loss_func, metrics=[])
        seed(3)
        learn.fit(1, cbs=KD(net(8, s=1), TaskLoss()+SoftTarget(T=4), output=output))
        assert left(learn)==[]
        return learn
    a,b = run(hf_vit(8), OfLogits(), output),run(Bare(hf_vit(8)), CrossEntropyLossFlat())
    assert_same(state(a.model), state(b.model.m))
    assert not torch.equal(a.model.classifier.weight, hf_vit(8).classifier.weight)
    assert a.recorder.values[-1][:2]==b.recorder.values[-1][:2]

def test_vit_learns_from_vit():
    "Dicts on both sides, layers of both"
    s,t = hf_vit(8),hf_vit(16, 1)
    learn = learner(s, loss_func=OfLogits(), metrics=[])
    kd = KD(t, TaskLoss()+SoftTarget()+FitNet().at(second_layer(t)[1]))
    learn.fit(1, cbs=kd)
    assert kd.parts['fit_net']>0
    assert kd.parts['agreement']>=0
    assert left(learn)==[]
