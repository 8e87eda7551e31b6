"""The one exception that command lines turn into a single line and exit status 2."""


class UserError(ValueError):
    """A user's mistake; its message is the one line that says what was wrong and what was expected."""
