"""What a case in Court rests on: one bundle of bytes about one receipt, and its checks."""
