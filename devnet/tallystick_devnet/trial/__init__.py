"""The Court end to end, on this machine: processes that cheat, accuse, judge and die; every token accounted for."""
