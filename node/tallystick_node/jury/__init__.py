"""The node as a juror: it watches the Court, recomputes what is accused, votes, and settles its ballots."""
