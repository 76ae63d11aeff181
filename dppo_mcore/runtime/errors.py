"""Errors that are the user's to mend: shown as one line, without a traceback."""


class UserError(ValueError):
    """Wrong input; the message names file, field or flag, and says what to do."""
