"""The contracts as typed calls: address book, reads, transactions, reverts in words."""
