"""The parts that `portraits.py` draws its pictures of."""
