"""What a person can mend, each in one line: what was needed, what came, what to do."""


class RunError(Exception):
    """Something the person who started the run can mend; the message is one line that says how."""


class ConfigError(RunError):
    """A configuration that cannot be run, in one line: what was needed, what came, what to do."""


class Interrupted(RunError):
    """Stopped by a signal, with everything saved that was worth saving."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
