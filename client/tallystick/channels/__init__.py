"""The channels that hold a client's money, as a person sees them."""
