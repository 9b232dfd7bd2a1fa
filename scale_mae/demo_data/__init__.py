"""The shipped images (see make.py) and the script that made them."""
