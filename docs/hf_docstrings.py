"""What the API pages read beside docstrings: the `help` of options, and references as transformers writes them."""

import ast
import re

from griffe import Attribute, Class, Docstring, Extension, Module, Object


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
FIELD = re.compile(r"^( +\w+) \(([^\n]+?), (?:defaults to (`?)([^\n]+?)\3|(\*optional\*))\):\s+", re.MULTILINE)


class HFDocstrings(Extension):
    """Turns `field(metadata={"help": ...})` into a docstring and a default, and [`Name`] into a link."""

    def on_package(self, *, pkg: Module, **kwargs) -> None:
        rooms = [room for room in pkg.modules.values() if room.exports]
        places = {name: _place(room, name) for room in reversed(rooms) for name in map(str, room.exports)}
        self._visit(pkg, places)

    def _visit(self, thing: Object, places: dict[str, str]) -> None:
        for member in thing.members.values():
            if member.is_alias:
                continue
            if isinstance(member, Attribute) and isinstance(thing, Class):
                _read_help(member)
            if member.docstring:
                if FIELD.search(member.docstring.value):
                    member.docstring.value = FIELD.sub(_field, member.docstring.value.replace("Args:", "Attributes:"))
                member.docstring.value = REFERENCE.sub(lambda found: _link(found, places), member.docstring.value)
            self._visit(member, places)


def _place(room: Module, name: str) -> str:
    """Where a name of a room is documented; one that is also a file's name hides behind that file here."""
    return f"{room.path}.{name}.{name}" if name in room.modules else f"{room.path}.{name}"


def _link(found: re.Match, places: dict[str, str]) -> str:
    name = found[2].rpartition(".")[2] if found[1] else found[2]
    place = places.get(name) if not found[1] or found[2].startswith("cab_hf.") else None
    return f"[`{name}`][{place}]" if place else f"`{name}`"


def _field(found: re.Match) -> str:
    """A field of a config: transformers writes its type and default as "name (`type`, defaults to value): "."""
    name, type_, _, default, _ = found.groups()
    return f"{name} ({type_.replace('`', '')}): `{default or None}` by default; "


def _read_help(option: Attribute) -> None:
    call = ast.parse(str(option.value), mode="eval").body if option.value is not None else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "field":
        return
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "metadata" in given:
        option.docstring = Docstring(ast.literal_eval(given["metadata"])["help"], parent=option)
    factory = given.get("default_factory")
    if "default" in given:
        option.value = ast.unparse(given["default"])
    elif isinstance(factory, ast.Lambda):
        option.value = ast.unparse(factory.body)
    else:
        option.value = None if factory is None else f"{ast.unparse(factory)}()"
