"""What the user got wrong."""


class UserError(Exception):
    """What the user got wrong, in one line that names the file, flag or value and what would be right."""
