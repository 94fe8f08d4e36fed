"""Fine-tunes a trained global model at every client: what ``personalize.py`` runs, and who gains and who is harmed."""

from fl_lightning.personalization.run import run

__all__ = ["run"]
