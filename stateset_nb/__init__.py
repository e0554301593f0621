"""Turn an agent's conversations into a better agent: `from stateset_nb import NAME` finds NAME in its room and loads that room only."""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from typing import Any as _Any


def _rooms() -> dict[str, str]:
    "Every public name, and the module it lives in, as nbdev's index has them; each module stands for itself."
    from ._modidx import d
    syms: _Any = d['syms']
    names = {n: room for room, known in syms.items() for s in known if '.' not in (n := s.removeprefix(room + '.')) and n[0] != '_'}
    return {room.removeprefix(__name__ + '.'): room for room in syms} | names


def __getattr__(name: str) -> _Any:
    room = None if name[:1] == '_' else _rooms().get(name)
    if room is None:
        from difflib import get_close_matches
        near = get_close_matches(name, _rooms(), 1)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}' + (f' — did you mean {near[0]!r}?' if near else ''), name=name)
    module = _import_module(room)
    value = module if room == f'{__name__}.{name}' else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_rooms()})
