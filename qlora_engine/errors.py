"""The one error type that means "the input is wrong", as opposed to "this program is wrong"."""


class InputError(ValueError):
    """A problem with what the user gave: the message says what was received and what is allowed.

    Command lines print it on one line and exit with status 2; anything else is a bug and keeps its traceback.
    """
