"""A table or figure of a paper, end to end, which is a comparison: ``python study.py lpft/table2_digit5``."""

from fl_lightning.compare import main

if __name__ == "__main__":
    main()
