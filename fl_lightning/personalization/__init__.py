"""Fine-tunes a trained global model at every client and shows who gains and who is harmed: what ``personalize.py`` runs."""

from fl_lightning.personalization.run import run

__all__ = ["run"]
