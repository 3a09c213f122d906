"""A pytest plugin that runs autoresearch: experiments as items, a git ratchet, and a ledger."""
