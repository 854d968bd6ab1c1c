"The accuracy run of `benchmarks/`, on a few random images in the standard layout"
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import At,assert_same,state
from safetensors.torch import save_file

folder = Path(__file__).parent.parent/'benchmarks'
sys.path.append(str(folder))
import accuracy  # noqa: E402
import models  # noqa: E402

cpu,one_cycle = torch.device('cpu'),accuracy.one_cycle
budget = accuracy.Budget(1, 3, 40, .05, 5e-4, True, one_cycle)       # 100 images: three steps an epoch
class Stop(Exception): ...

@pytest.fixture
def where(tmp_path, monkeypatch):
    "Three images of each class in train, 50 in test, and a teacher that was never trained"
    rng,here = np.random.default_rng(0),tmp_path/'cifar-100-python'
    here.mkdir()
    for split,labels in dict(train=[*range(100)]*3, test=[*range(50)]).items():
        pixels = rng.integers(0, 256, (len(labels),3072), dtype=np.uint8)
        (here/split).write_bytes(pickle.dumps(dict(data=pixels, fine_labels=labels, coarse_labels=[0]*len(labels))))
    torch.manual_seed(0)
    teacher = accuracy.teachers['resnet8_wide_stem']
    save_file(teacher.make().state_dict(), tmp_path/'resnet8_wide_stem.safetensors')
    monkeypatch.setitem(accuracy.teachers, 'resnet8_wide_stem', teacher._replace(accuracy=None))
    (tmp_path/'out').mkdir()
    return accuracy.Where(tmp_path, tmp_path, tmp_path/'out', 'cpu')

def run(arm, seed=0, budget=budget):
    return accuracy.Run('tiny', budget, 'resnet8', 'resnet8_wide_stem', arm, seed, accuracy.Options(*[False]*3))
def data(where): return [accuracy.read(where.data, o) for o in ('train','test')]
def results(where, arm): return json.loads((where.out/f'{accuracy.name_of(run(arm))}.json').read_text())
def timeless(r): return {k: v for k,v in r.items() if k!='seconds'}

def test_published_networks_have_the_parameters_that_are_stated():
    "Numbers of the README that came with the weights"
    want = dict(resnet32=472756, resnet32_wide_stem=501316, resnet26_wide_stem=404100, resnet20_wide_stem=306884,
                resnet14_wide_stem=209668, resnet8_wide_stem=112452)
    assert {k: sum(p.numel() for p in t.make().parameters()) for k,t in accuracy.teachers.items()}==want
    assert models.wide_stem(8)(torch.randn(2, 3, 32, 32)).shape==(2,100)

def test_steps_of_240_epochs():
    f = accuracy.steps(.05, 240)
    at = {n: f(n/240) for n in (0,149,150,179,180,209,210,239)}
    assert list(at.values())==pytest.approx([.05,.05,.005,.005,5e-4,5e-4,5e-5,5e-5])

def test_reading(where):
    images,labels = accuracy.read(where.data, 'train')
    raw = pickle.loads((where.data/'cifar-100-python'/'train').read_bytes())['data']
    assert images[7,2,5,9]==raw[7,2*1024+5*32+9]           # planes of red, green and blue, row by row
    kept,of = accuracy.first_of_each(images, labels, 2)
    assert torch.equal(kept, images[:200]) and of.bincount().tolist()==[2]*100

def test_an_epoch_is_made_of_crops_and_mirrors_and_follows_seed_and_epoch(where):
    images,labels = accuracy.first_of_each(*data(where)[0], 1)
    teacher = accuracy.teachers['resnet8_wide_stem']
    def epoch(seed, n):
        dl = accuracy.Batches(images, labels, 40, teacher, cpu, seed=seed)
        dl.epoch = n
        return dl
    (x,y),again,seen = epoch(3, 1).drawn(),epoch(3, 1).drawn(),set()
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x, epoch(3, 2).drawn()[0]) and not torch.equal(x, epoch(4, 1).drawn()[0])
    assert sorted(y.tolist())==labels.tolist()
    for got,label in zip(x, y.tolist(), strict=True):
        wide = np.pad(images[label].numpy(), ((0,0),(4,4),(4,4)))
        ways = [(i,j,k) for i in range(9) for j in range(9) for k in (1,-1)
                if np.array_equal(wide[:,i:i+32,j:j+32][...,::k], got.numpy())]
        assert len(ways)==1
        seen.add(ways[0])
    assert {o[0] for o in seen}=={o[1] for o in seen}==set(range(9)) and {o[2] for o in seen}=={1,-1}
    batches = list(epoch(3, 1))
    assert [len(b) for _,b in batches]==[40,40,20] and len(epoch(3, 1))==3
    mean,std = (np.array(o).reshape(3, 1, 1) for o in (teacher.mean,teacher.std))
    np.testing.assert_allclose(batches[0][0][5].numpy(), (x[5].numpy()/255-mean)/std, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('arm', accuracy.arms)
def test_resumed_equals_uninterrupted(where, arm):
    def stop(learn):
        if learn.training and (learn.epoch,learn.iter)==(1,1): raise Stop
    whole = accuracy.fit(run(arm), data(where), where, cpu)
    want,other = results(where, arm),where._replace(out=where.out/'other')
    other.out.mkdir()
    with pytest.raises(Stop): accuracy.fit(run(arm), data(where), other, cpu, cbs=[At('before_batch', stop)])
    half = results(other, arm)
    assert half['epochs_done']==1 and half['accuracy']==want['accuracy'][:1]
    assert accuracy.unfinished(run(arm), other.out)
    torch.manual_seed(99)
    again = accuracy.fit(run(arm), data(where), other, cpu)
    assert_same(state(again.model), state(whole.model))
    assert timeless(results(other, arm))==timeless(want)
    assert ('expression' in want)==(arm!='alone')
    assert want['epochs_done']==3 and want['steps_done']==9 and len(want['loss'])==3
    assert not accuracy.unfinished(run(arm), other.out)

def test_accuracy_and_loss_of_the_last_epoch(where):
    "Against the whole test set in one go"
    learn = accuracy.fit(run('alone'), data(where), where, cpu)
    x,y = data(where)[1]
    t,r = accuracy.teachers['resnet8_wide_stem'],results(where, 'alone')
    mean,std = (torch.tensor(o).view(3, 1, 1) for o in (t.mean,t.std))
    with torch.no_grad(): pred = learn.model.eval()((x/255-mean)/std)
    assert r['accuracy'][-1]==pytest.approx(100*(pred.argmax(1)==y).float().mean().item())

def test_all_arms_start_equal_and_see_the_same(where):
    first = []
    def note(learn):
        if learn.training and learn.iter==0 and learn.epoch==0: first.append((learn.x.clone(),state(learn.model)))
    for arm in ('alone','FCFD'): accuracy.fit(run(arm), data(where), where, cpu, cbs=[At('before_batch', note)])
    (x,m),(other,n) = first
    assert torch.equal(x, other)
    assert_same(m, n)

def test_the_time_is_over(where):
    accuracy.fit(run('SoftTarget'), data(where), where, cpu, deadline=0)
    assert not list(where.out.glob('*.json')) and accuracy.unfinished(run('SoftTarget'), where.out)

def test_a_teacher_that_is_not_what_it_was_is_refused(where, monkeypatch):
    t = accuracy.teachers['resnet8_wide_stem']
    monkeypatch.setitem(accuracy.teachers, 'resnet8_wide_stem', t._replace(accuracy=64.11))
    with pytest.raises(ValueError, match='of 50 test images, but came with 64.11 %.*normalisation'):
        accuracy.fit(run('SoftTarget'), data(where), where, cpu)

driver = """
import sys
sys.path.insert(0, {folder!r})
import accuracy
accuracy.budgets['tiny'] = accuracy.Budget(1, 1, 40, .05, 5e-4, True, accuracy.one_cycle)
accuracy.teachers['resnet8_wide_stem'] = accuracy.teachers['resnet8_wide_stem']._replace(accuracy=None)
if __name__=='__main__':
    accuracy.main(budget='tiny', student='resnet8', teacher='resnet8_wide_stem', arm='alone,SoftTarget', seeds='1',
                  epochs=int(sys.argv[1]), data='.', teachers_in='.', out='out', jobs=2, write_to='table.md')
"""
def test_two_side_by_side_then_nothing_left_then_other_settings(where):
    (where.data/'driver.py').write_text(driver.format(folder=str(folder)))
    def call(epochs):
        return subprocess.run([sys.executable,'driver.py',str(epochs)], cwd=where.data, capture_output=True, text=True)
    first = call(1)
    assert first.returncode==0, first.stderr
    files = {f.name: f.read_text() for f in where.out.glob('*.json')}
    assert len(files)==2 and first.stdout.count('epoch 1 of 1')==2
    table = (where.data/'table.md').read_text()
    again = call(1)
    assert again.returncode==0 and 'epoch 1 of 1' not in again.stdout
    assert {f.name: f.read_text() for f in where.out.glob('*.json')}==files
    assert (where.data/'table.md').read_text()==table
    assert '| alone |  | 1 | 1 of 1 | 3 | 0.00 |' in table and '| FCFD |  |  |  |' in table
    assert '| SoftTarget | `0.1*TaskLoss() + 0.9*SoftTarget(T=4)` | 1 | 1 of 1 | 3 |' in table
    other = call(2)
    assert other.returncode and 'epochs = 1, not 2: another --out is needed' in other.stderr

def test_table(where):
    "Means and deviations by hand; a seed that is not done has no accuracy"
    setting = accuracy.settings(run('alone'))
    def store(arm, seed, accuracies, parts):
        r = dict(settings=setting, arm=arm, seed=seed, machine='here', epochs_done=len(accuracies), steps_done=9,
                 accuracy=accuracies, seconds=[2.]*len(accuracies), parts=parts)
        if parts: r |= dict(expression='SoftTarget(T=4)', teacher_accuracy=64.1)
        (where.out/f'{arm}-{seed}.json').write_text(json.dumps(r))
    for seed,last in enumerate((20.,23.,26.)): store('alone', seed, [50.,0.,last], [])
    for seed,last in enumerate((21.,25.)): store('SoftTarget', seed, [0.,0.,last], [dict(agreement=.25+seed/2)])
    store('SoftTarget', 2, [99.,99.], [dict(agreement=.9)])
    lines = accuracy.report(where.out).splitlines()
    assert '| alone |  | 0, 1, 2 | 3 of 3 | 9 | 23.00 ± 3.00 |  | 2.0 |  |' in lines
    assert ('| SoftTarget | `SoftTarget(T=4)` | 0, 1, 2 | 2 of 3, 3 of 3 | 9 | 23.00 ± 2.83 | +1.50 ± 0.71 | 2.0 '
            '| 0.50 ± 0.35 |') in lines
    assert '| Attention |  |  |  |  |  |  |  |  |' in lines
