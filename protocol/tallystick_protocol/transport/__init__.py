"""How nodes are reached and recognised: signed addresses, pinned TLS keys, what may be dialled."""
