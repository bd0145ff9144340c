"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake in the user's data, config or files, told in one sentence that names the culprit.

    Entry points print it without a traceback and exit with status 2; everything else is a bug of
    ours.
    """
