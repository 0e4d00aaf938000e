"""The report: one page, linked pages, and the published run."""
