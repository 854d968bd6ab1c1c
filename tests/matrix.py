"What works with what: a table that test_fastai.py fills, perhaps in another process, and conftest.py prints or writes"
from pathlib import Path

page = Path(__file__).parents[1]/'nbs'/'works_with.md'

class Matrix:
    "Cells found so far, `{(row,column): '✓', '✓ with …' or '✗ why'}`, of the tables in `parts`, `{title: [rows]}`"
    def __init__(self): self.columns,self.parts,self.cells = (),{},{}

    def dump(self):
        "As plain lists, for another process"
        return dict(columns=list(self.columns), parts=self.parts, cells=[[*k,v] for k,v in self.cells.items()])
    def load(self, there):
        "What another process found, too"
        if not there: return
        self.columns,self.parts = self.columns or there['columns'],self.parts or there['parts']
        self.cells.update({(row,column): text for row,column,text in there['cells']})

    def tables(self):
        "Cells with ✗ and – numbered, and what the numbers mean; one that did not run or did not hold is '?'"
        why = []
        def cell(o):
            if o[:1] not in '✗–': return o
            if o not in why: why.append(o)
            return f'{o[0]} {why.index(o)+1}'
        def row(n): return [cell(self.cells.get((n,c), '?')) for c in self.columns]
        tables = {title: {n: row(n) for n in names} for title,names in self.parts.items()}
        return tables,[o[2:] for o in why]

    def shown(self):
        "As lines of text"
        tables,why = self.tables()
        wide = max(len(n) for t in tables.values() for n in t)
        def line(first, cells):
            rest = '  '.join(c.ljust(len(h)) for c,h in zip(cells, self.columns))
            return f'{first.ljust(wide)}  {rest}'.rstrip()
        for title,rows in tables.items():
            yield ''
            yield line(title, self.columns)
            for n,r in rows.items(): yield line(n, r)
        yield ''
        for i,o in enumerate(why): yield f'{i+1}: {o}'

    def written(self):
        "As lines of the documentation's page"
        tables,why = self.tables()
        yield from intro.splitlines()
        for title,rows in tables.items():
            yield f'## {title}'
            yield ''
            yield '| | '+' | '.join(self.columns)+' |'
            yield '|---|'+':-:|'*len(self.columns)
            for n,r in rows.items(): yield f'| {n} | '+' | '.join(r)+' |'
            yield ''
        for i,o in enumerate(why): yield f'{i+1}. {o}'

intro = (
    '# What works with what\n\n'
    '> Every ✓ is a fit that was compared with the same fit written by hand.\n\n'
    'Written by `make matrix` from what `tests/test_fastai.py` found. '
    'A cell is ✓ where a real, small Learner with the callback trains to the weights and losses of one '
    'whose loss function holds the distillation, written out with hooks and formulas of the test\'s own. '
    'The columns are the loss that is picked for the task (`KnowledgeDistillationCallback(teacher)`), '
    'a feature loss with learned adapters (`TaskLoss()+FitNet()`), '
    'and one that runs parts of both networks again (`TaskLoss()+FCFD()`). '
    'Where that line is refused because its layers have to be named, '
    'the cell says what was written behind the loss, as in `TaskLoss()+FitNet().at(…)`; '
    'the names are those of the networks in that row. '
    '✗ is refused before anything is trained; – was not tried; the reasons are below.\n\n')

found = Matrix()
