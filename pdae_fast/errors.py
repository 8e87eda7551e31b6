"""The one exception that command lines turn into a single line and exit status 2."""

import re

# Of names in damaged files: what would break the line, command the terminal, or not be written as UTF-8.
_BLANK, _UNPRINTABLE = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+"), re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class UserError(ValueError):
    """A user's mistake; its message is the one line that says what was wrong and what was expected."""

    def __init__(self, message: object = "") -> None:
        super().__init__(_UNPRINTABLE.sub("?", _BLANK.sub(" ", str(message))))
