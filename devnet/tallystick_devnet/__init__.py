"""The whole network on one machine: chain, contracts, content, nodes. For demos, tests and trying things out."""
