"""How the API page shows this package's docstrings: what they say of each argument as a list, raises and sources apart.

A docstring here is plain text in which `name: what it is.` speaks of an argument. mkdocs.yml names this extension of griffe.
"""

import re
from typing import Any

import griffe

APART = re.compile(r"(?<=[.)\]]) (?=Raises \w|Returns |Source: )")  # what begins a paragraph


class Arguments(griffe.Extension):
    """Rewrites each docstring as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None and (obj.is_function or obj.is_class):
            obj.docstring.value = markdown(obj.docstring.value, names_of(obj))


def names_of(obj: griffe.Object) -> set[str]:
    """What a docstring may speak of: parameters of a function, fields and parameters of a class."""
    if isinstance(obj, griffe.Function):
        return {parameter.name for parameter in obj.parameters}
    maker = obj.members.get("__init__")
    made = names_of(maker) if isinstance(maker, griffe.Function) else set()
    return made | {name for name, member in obj.members.items() if member.is_attribute}


def markdown(text: str, names: set[str]) -> str:
    """Paragraph by paragraph; indented ones are code and stay."""
    return "\n\n".join(p if p.startswith("    ") else paragraph(p, names) for p in text.split("\n\n"))


def paragraph(text: str, names: set[str]) -> str:
    """One paragraph of a docstring as Markdown."""
    text = re.sub(r"\n(?=\w+ {2,}\S)", "\n\n", text)  # a column of terms
    text = re.sub(r"(?m)^(\w+) {2,}(?=\S)", r"**\1** ", text).replace("*", "\\*").replace("\\*\\*", "**")
    text = re.sub(r"(?<!\n)\n(?!\n) *(?=\S)", " ", text).replace("<", "&lt;")
    for start in ("Raises ", "Returns ", "Source: "):
        text = text.replace(f"\n{start}", f"\n\n{start}")
    text = APART.sub("\n\n", text)
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not known:
        return text
    told = re.compile(rf"(?:^|(?<=[.;)] )|(?<=\n))((?:{known})(?:, (?:{known}))*): ", flags=re.MULTILINE)
    if not told.search(text):
        return text
    text = told.sub(lambda found: f"\n- `{found[1]}`: ", text)
    before, *items = text.split("\n- ")
    ends = re.split(r"\n\n", items[-1], maxsplit=1)
    listed = "\n".join(f"- {item.replace(chr(10) * 2, ' ').strip()}" for item in [*items[:-1], ends[0]])
    return "\n\n".join(part for part in (before.strip(), listed, *ends[1:]) if part)
