"""The one exception that a command shows as one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's; the message is one line that names the file, flag or value and what would be right."""
