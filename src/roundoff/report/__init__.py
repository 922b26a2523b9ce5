"""What runs say: tables, comparisons and one self-contained page, from run directories alone and without torch."""
