"""`python -m utnetv2_fast` is `utnetv2-fast`."""

from utnetv2_fast.cli.app import main

main()
