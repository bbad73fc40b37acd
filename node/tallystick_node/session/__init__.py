"""One session at this node: rows in, rows out, receipts, money, and who may open one."""
