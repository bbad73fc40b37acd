"""Policy `agree=k`: one answer carried by k routes of different owners, released as far as all of them agree."""
