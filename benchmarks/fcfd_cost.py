"""What FCFD costs: its steps as a multiple of SoftTarget's, in time and in floating-point operations, and each mixed path by itself.

python benchmarks/fcfd_cost.py --cpu --write benchmarks/fcfd_cost.md"""
import copy,gc,itertools,os,platform,statistics,sys,time
import fastai,torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from fasterdistill.callback import KnowledgeDistillationCallback
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.networks.net import Net
from speed import Batches,cases,learner,ratio,stages

# -- what is measured
candidates = [(d,i) for d in ('s2t','t2s') for i in range(len(stages)-1)]

def word(d, i):
    "A path, a letter for each part of the networks: up to the end of the first stage, of the others, and the head"
    a,b = d.split('2')
    return ' '.join([a]*(i+1)+['|']+[b]*(len(stages)-i))

def drawing(draws):
    "FCFD that takes these draws in turn, so that the mean of an epoch is that of all draws"
    fcfd,turn = FCFD(paths=len(draws[0])),itertools.cycle(draws)
    fcfd.draw = lambda: next(turn)
    return fcfd

pairs = list(itertools.combinations(candidates, 2))
ways = {'SoftTarget()': SoftTarget, 'FCFD(paths=0)': lambda: FCFD(paths=0), **{word(*c): lambda c=c: drawing([[c]]) for c in candidates}, 'FCFD()': lambda: drawing(pairs)}

# -- how
class Count(Callback):
    "Floating-point operations of one step, forward and backward: those of the second batch, as the first one opens"
    order = 90
    def before_batch(self): self.counter = FlopCounterMode(display=False).__enter__()
    def after_backward(self): self.counter.__exit__(None, None, None); self.flops = self.counter.get_total_flops()

def flops(f):
    with torch.no_grad(), FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()

def networks(case, device):
    "Student, teacher with averages that fit the data, and the data"
    torch.manual_seed(0)
    student,teacher = case.student().to(device),case.teacher().to(device)
    data = [(torch.randn(case.bs, 3, case.size, case.size, device=device), torch.randint(100, (case.bs,), device=device)) for _ in range(4)]
    with torch.no_grad():
        for x,_ in data: teacher(x)
    return student,teacher,data

def made(student, teacher, dl, loss, cbs=()):
    return learner(dl, copy.deepcopy(student), [KnowledgeDistillationCallback(copy.deepcopy(teacher), TaskLoss()+loss), *cbs])

def suffixes(student, teacher, x):
    "Forward operations of both networks, and of what each path runs after its switch"
    nets = dict(s=Net(student, x, stages), t=Net(teacher, x, stages))
    full = {k: flops(lambda: n(x)) for k,n in nets.items()}
    with torch.no_grad(): maps = {k: n(x).fm for k,n in nets.items()}
    res = {}
    for d,i in candidates:
        k,layer = d[-1],stages[i]
        nets[k].can_resume(layer)                        # tries the cut, which takes passes that are not to be counted
        res[d,i] = flops(lambda: nets[k].resume(layer, maps[k][layer]))
    return full,res

def count(student, teacher, data, device):
    "Operations of a step of each way; of FCFD() the mean over its draws"
    res = {}
    for name,loss in ways.items():
        steps = len(pairs) if name=='FCFD()' else 1
        got = []
        class Each(Count):
            def after_backward(self): super().after_backward(); got.append(self.flops)
        made(student, teacher, Batches(data, steps, 1, device, time.perf_counter), loss(), [Each()])()
        res[name] = statistics.mean(got[1:])
    return res

def measure(student, teacher, data, steps, rounds, warm, device, clock, progress):
    "Times of `rounds` interleaved epochs of every way, in ms a step"
    n = {name: steps if name=='FCFD()' else max(steps//3, 2) for name in ways}
    dls = {name: Batches(data, n[name], warm, device, clock) for name in ways}
    runs,times = {name: made(student, teacher, dls[name], loss()) for name,loss in ways.items()},{name: [] for name in ways}
    for r in range(rounds+1):                            # the first round is not counted
        for name in list(ways)[::1 if r%2 else -1]:
            gc.collect()
            dls[name].restart(); runs[name]()
            _,b,c = dls[name].stamps
            if r: times[name].append((c-b)/n[name]*1e3)
            if progress: print(f'\r  round {r} of {rounds}, {name:14}', end='', file=sys.stderr, flush=True)
    if progress: print('\r'+' '*40+'\r', end='', file=sys.stderr)
    return times

# -- what is written
def table(head, rows): return '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---']*len(head), *rows])

def report(name, full, suffix, ops, times):
    "Two tables of a case: whole steps, and the paths one by one (a bar is escaped, in a table of Markdown)"
    soft,base = 'SoftTarget()','FCFD(paths=0)'
    less = lambda w: [a-b for a,b in zip(times[w], times[base], strict=True)]
    whole = [(w, f'{statistics.median(times[w]):.1f}', ratio(times[w], times[soft]), f'{ops[w]/1e9:.3g}', f'{ops[w]/ops[soft]:.3f}') for w in (soft, base, 'FCFD()')]
    rows = []
    for c in candidates:
        w,k = word(*c),c[0][-1]
        rows.append((w.replace('|', '\\|'), dict(s='student',t='teacher')[k], f'{suffix[c]/1e9:.3g}', f"{suffix[c]/full['s']:.2f}", f"{suffix[c]/full['t']:.2f}", f'{(ops[w]-ops[base])/ops[soft]:.3f}', ratio(less(w), times[soft])))
    two = 2*statistics.mean(ops[word(*c)]-ops[base] for c in candidates)/ops[soft]
    rows.append(('two of four, the mean', '', '', '', '', f'{two:.3f}', ratio(less('FCFD()'), times[soft])))
    return (f"## {name}\n\nForward: student {full['s']/1e9:.3g} GFLOP, teacher {full['t']/1e9:.3g} GFLOP a batch.\n\n"
            + table(('step','ms','time / SoftTarget','GFLOP','GFLOP / SoftTarget'), whole) + '\n\n'
            + table(('path','its suffix is of the','suffix, GFLOP','of the student\'s forward','of the teacher\'s forward','extra expected from FLOPs','extra in time'), rows))

legend = """Both losses stand beside `TaskLoss()` in the same Learner and callback. *FCFD(paths=0)* has the bridges and compares the maps, without a mixed path; *FCFD()* takes the six possible draws of two paths in turn.
A path is a word over the student `s` and the teacher `t`, a letter for each part: up to the end of stage 1, stage 2, stage 3, and the head.
*suffix*: forward operations after the switch, by `torch.utils.flop_counter` (convolutions and matrix products; a multiplication and its addition are two). Columns *GFLOP* count a step's forward and backward passes.
*extra*: what a path adds to *FCFD(paths=0)*, as a part of a SoftTarget step; that from FLOPs holds its suffix forward and backward, and the bridge from teacher to student where it needs one.
Times: median over rounds of ratios of epochs close in time, the middle half in brackets."""

@call_parse
def main(
    case:str='',       # Only cases whose name holds this
    rounds:int=5,      # Epochs of each way, timed
    steps:int=6,       # Steps of FCFD() a timed epoch, a multiple of 6 (ten times as many where a step is short); a third of them of the others
    warm:int=1,        # Batches before each timed epoch
    device:str='',     # cpu, cuda, …; the default is a GPU where there is one
    threads:int=1,     # Threads of torch's operations on the CPU; 0: its own choice
    cpu:bool=False,    # Count the processor's time, not that of the clock: for a busy machine, without a GPU
    write:str='',      # Markdown file for the tables
    quiet:bool=False,  # No count of rounds
):
    "Print the cost of a step of FCFD as a multiple of SoftTarget's, beside the operations its mixed paths take"
    if rounds<2: sys.exit('--rounds: at least 2, the spread is shown too')
    if steps%len(pairs): sys.exit(f'--steps {steps}: expected a multiple of {len(pairs)}, so that all draws come equally often')
    if threads: torch.set_num_threads(threads)
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if cpu and device.type!='cpu': sys.exit('--cpu counts the time of this machine\'s processor alone: with it go --device cpu')
    before,parts = os.getloadavg(),[]
    for name,spec in cases.items():
        if case not in name: continue
        nets = networks(spec, device)
        (full,suffix),ops = suffixes(*nets[:2], nets[2][0][0]),count(*nets, device)
        times = measure(*nets, steps*(10 if spec.bs<16 else 1), rounds, warm, device, time.process_time if cpu else time.perf_counter, not quiet)
        parts.append(report(name, full, suffix, ops, times))
        print(parts[-1]+'\n', flush=True)
    chip = torch.cuda.get_device_name(device) if device.type=='cuda' else f'{platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}'
    load = lambda o: ', '.join(f'{x:.1f}' for x in o)
    where = (f'{device.type} ({chip}); torch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}; times of {"the processor" if cpu else "the clock"}; '
             f'load averages before {load(before)}, after {load(os.getloadavg())}; `{" ".join(["fcfd_cost.py", *sys.argv[1:]])}`')
    print(where)
    if write:
        with open(write, 'w', encoding='utf-8') as f: f.write('Written by `fcfd_cost.py`.\n\n'+'\n\n'.join([*parts, legend, where])+'\n')
