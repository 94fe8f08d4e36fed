"""What only one paper needs: one file each."""
