"""The staking node: pieces -> model span -> engine -> sessions -> server; till, journal, stake."""
