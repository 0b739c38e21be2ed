"""The study: params.yaml in; data, runs, results, figures and MLflow runs out."""
