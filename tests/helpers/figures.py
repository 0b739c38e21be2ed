"""Draw a plot by its name."""

import pandas as pd

from pipeline.config.plots import load_plot
from pipeline.storage.tables import REFERENCE_COLUMNS

NO_REFERENCES = pd.DataFrame(columns=[*REFERENCE_COLUMNS])


def draw(plot, study, ablation, results, references=NO_REFERENCES):
    return load_plot(plot).draw(study, ablation, results, references)
