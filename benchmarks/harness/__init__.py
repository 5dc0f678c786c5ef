"""What every benchmark shares; the programs are in the folder above."""
