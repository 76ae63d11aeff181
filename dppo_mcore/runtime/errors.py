"""Errors that are the user's to mend: shown as one line, without a traceback."""

SAYING_S = 5.0
"""A node's other ranks leave its first one this long to say what is wrong with all of them."""


class UserError(ValueError):
    """Wrong input; the message names file, field or flag, and says what to do."""
