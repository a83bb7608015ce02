"""Messages that are one line, whatever the names in them: anybody may have written an archive's.

raise ValueError(one_line(f"{path} lacks {name}"))
"""


def one_line(message: object) -> str:
    r"""A message whose characters can all be printed; a newline, a NUL, an escape or half a surrogate pair becomes \n, \x00, \x1b, \udc80."""
    said = str(message)
    if said.isprintable():
        return said
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
