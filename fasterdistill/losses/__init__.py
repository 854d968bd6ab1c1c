"Every method: what the pages of this folder define, found by itself, so that a new page touches no other file"
from importlib import import_module
from pkgutil import iter_modules

_pages = [import_module(f'{__name__}.{m.name}') for m in iter_modules(__path__)]
globals().update({name: getattr(page, name) for page in _pages for name in page.__all__})
__all__ = [name for page in _pages for name in page.__all__]
