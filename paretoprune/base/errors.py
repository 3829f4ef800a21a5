"""Errors for people: one line that says condition, what was got, and the remedy; and anybody's errors as one line."""

from __future__ import annotations


class UserError(ValueError):
    """Something that a person can put right; the text is one line and fit to be shown as it is."""

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses processes with its text and what it holds; a subclass's constructor may take other arguments."""
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[UserError], args: tuple[object, ...], state: dict[str, object]) -> UserError:
    base = OSError if issubclass(kind, OSError) else ValueError  # the one that lays the object out
    error: UserError = base.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


def one_line(said: object, most: int | None = None) -> str:
    """A text, or what an error says, on one line of at most `most` characters, without Ultralytics' marks."""
    return " ".join(str(said).replace("❌", " ").replace("\N{VARIATION SELECTOR-16}", " ").split())[:most]


def first_line(error: BaseException | None, most: int = 200) -> str:
    """The first line of what an error says, its type's name where it says nothing; "…" where it is cut."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = one_line(lines[0]).rstrip(".")
    return line if len(line) <= most else line[: most - 1] + "…"


def typed_line(error: BaseException, most: int = 300, whole: bool = False) -> str:
    """``Type: first line`` of an error (``whole``: all its lines as one), the type alone where it says nothing."""
    lines = str(error).strip().splitlines()
    said = one_line(error if whole else lines[0]) if lines else ""
    return (f"{type(error).__name__}: {said}" if said else type(error).__name__)[:most]
