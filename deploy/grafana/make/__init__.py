"""Makes dashboards/*.json, by `python -m deploy.grafana.make` in the root; a test holds the files to it."""
