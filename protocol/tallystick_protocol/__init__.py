"""What node and client must agree on: types, errors, frames, receipts, vouchers, manifest, content and chain."""
