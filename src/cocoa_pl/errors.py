"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake in the user's data, config or files, told in one sentence that names the culprit.

    Entry points print it without a traceback and exit with status 2; everything else is a bug of
    ours.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker hands its whole traceback over as the message of a new UserError.
        super().__init__(message.rsplit(f"{__name__}.UserError: ", 1)[-1].rstrip("\n"))
