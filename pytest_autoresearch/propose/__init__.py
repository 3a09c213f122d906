"""Who edits the mutable file: a tuner of its constants, or an agent's command."""


class NoProposal(Exception):
    """Raised by a proposer to say in one line why there is no proposal this time."""
