"""What a person can mend, each in one line: what was needed, what came, what to do."""

from gkl.lines import one_line


class RunError(Exception):
    """Something the person who started the run can mend; the message is one line that says how."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(RunError):
    """A configuration that cannot be run, in one line: what was needed, what came, what to do."""


class LostProcess(RunError):
    """Another process of the run is gone or does not answer; why, another may know."""


class NotBegun(RunError):
    """A step that could not begin on any of the processes, and has changed nothing: what the steps before it have come to can be saved."""


class Interrupted(BaseException):
    """Stopped by a signal, with everything saved that was worth saving. No Exception: nothing that catches those swallows it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def in_a_line(error: BaseException) -> str:
    """What another library's error says, of its lines one, and not all of a long one."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
