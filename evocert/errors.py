"""What a user can cause, as one exception. Lowest layer: imports nothing."""


class InputError(ValueError):
    """Bad input: the message is one line that names the thing, the value found, and what is allowed.

    The command line prints the message and exits with status 2; a library user can catch it as a ValueError.
    """
