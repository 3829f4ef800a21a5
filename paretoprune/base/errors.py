"""The base of all errors that are for people: one line that says condition, what was got, and the remedy."""

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
