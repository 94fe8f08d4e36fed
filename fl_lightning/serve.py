"""``python -m fl_lightning.serve RUN``: the models of a run, for its sites to predict with."""

from fl_lightning.sites.serving import main

if __name__ == "__main__":
    main()
